"""What training reads rows for: how they are tokenised, which of them it cannot use, and why."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pydantic

from mmpo_jax.core.errors import DataError
from mmpo_jax.core.files import fingerprint_json
from mmpo_jax.data.contexts import (
    OtherImage,
    all_contexts,
    differs,
    filled_responses,
    tokenize_contexts,
)
from mmpo_jax.data.critiques import tokenize_scored
from mmpo_jax.data.processor import Processor
from mmpo_jax.data.records import Record
from mmpo_jax.data.rows import MessagesAs
from mmpo_jax.data.skipped import Problem
from mmpo_jax.data.tokenization import TokenizedRecord, tokenize
from mmpo_jax.data.tokenized_rows import SOLUTION
from mmpo_jax.objectives.registry import Scored, is_field
from mmpo_jax.objectives.terms import Term, needs, rows_read
from mmpo_jax.recipes.rollout import Rollout
from mmpo_jax.recipes.teacher import Teacher
from mmpo_jax.recipes.training import Reference, Training
from mmpo_jax.rewards.registry import REWARDS
from mmpo_jax.training.fields import lacks, maker_of, score_names
from mmpo_jax.training.losses import contexts_of, needs_reference
from mmpo_jax.training.teacher import TeacherProcessor, with_teacher

FIELDS_COLUMN, SCORE_COLUMN, GIVEN_COLUMN = "fields", "score_name", "given"
"""Columns: SHA-256 of what objectives read of the responses, what their score is called, and the
reference's log-probs that the data give."""


@dataclasses.dataclass(frozen=True)
class LearnedUse:
    """Responses that objectives learn from."""

    objectives: tuple[tuple[str, tuple[str, ...]], ...]
    """Names of the objectives, each with the fields it needs."""
    messages_as: MessagesAs = "last_turn"
    best_only: bool = False
    """Whether of ranked responses only the best are learned."""
    other: OtherImage | None = None
    """Where other images come from, if objectives need any."""
    joint: bool = False
    """Whether prompts are learned with the responses."""
    compares: bool = False
    """Whether objectives compare responses by their texts alone."""
    given: bool = False
    """Whether the data give the reference's log-probs."""
    scored: Scored | None = None
    """How a reward head reads the responses, if one does."""
    supervised: bool = True
    modules: tuple[str, ...] = ()
    columns: tuple[str, ...] = (FIELDS_COLUMN, SCORE_COLUMN, GIVEN_COLUMN)

    @classmethod
    def of(cls, terms: Sequence[Term], reference: Reference, seed: int = 0) -> LearnedUse:
        """The use of rows that these objectives make.

        Objectives of tokens, such as SFT, take whole dialogues, and of ranked responses the best
        only, unless one of them chooses by a score or a verdict.

        Args:
          terms: whose options agree on the contexts, as a recipe's do.
          reference: of the recipe.
          seed: of what is random in other images.
        """
        rows, other = rows_read(terms), None
        dialogues = all(term.objective.kind == "tokens" for term in terms)
        supervised = dialogues and rows.scored is None
        # Without fields but the turn, nothing is read of the responses that are not learned.
        best_only = supervised and {"turn"} >= set(filter(is_field, needs(terms)))
        if rows.other_image is not None:
            kind = None if rows.other_image == "data" else rows.other_image
            other = OtherImage(kind, rows.noise_step, seed, rows.mask_share)
        comparing = ("pairs", "rankings", "rewards")
        compared = [term for term in terms if term.objective.kind in comparing]
        return cls(
            tuple(
                (term.objective.name, tuple(sorted(filter(is_field, term.needs)))) for term in terms
            ),
            messages_as="dialogue" if supervised else "last_turn",
            best_only=best_only,
            other=other,
            joint=rows.joint,
            # After another image a text compares with itself.
            compares=bool(compared) and not any(term.rows.other_image for term in compared),
            given=reference.type == "given" and needs_reference(terms),
            scored=rows.scored,
        )

    @property
    def fields(self) -> tuple[str, ...]:
        """Fields that any of the objectives needs, in order."""
        return tuple(sorted({field for _, fields in self.objectives for field in fields}))

    def key(self) -> Any:
        """All that the methods depend on, as JSON."""
        key = dataclasses.asdict(self) | {"modules": ()}
        if self.scored is None:  # as it was before there were reward models
            del key["scored"]
        return key

    def tokenize(
        self, record: Record, processor: Processor, max_prompt: int, max_response: int
    ) -> TokenizedRecord:
        """Tokens of a record in the contexts that the objectives need."""
        if self.scored is not None:
            return tokenize_scored(record, processor, max_prompt, max_response, scored=self.scored)
        row = tokenize_contexts(
            record, processor, max_prompt, max_response, other=self.other, joint=self.joint
        )
        return row

    def unfit(self, record: TokenizedRecord) -> Problem | None:
        """(reason, detail) why a record cannot be learned from; None if it can."""
        if not record.responses:
            return "empty_response", "no response to learn"
        if "desirable" not in self.fields and any(
            response.source.desirable is False for response in record.responses
        ):
            return "undesirable", "a response that is labelled as not desirable"
        for name, fields in self.objectives:
            for field in fields:
                problem = lacks(record, field)
                if problem is not None:
                    reason, detail = problem
                    return reason, f"{name} needs the field {field!r}: {detail}"
        tied = self.scored is not None and len({r.source.rank for r in record.responses}) < 2
        if self.compares and not tied and not differs(record):
            cut = any(response.truncated for response in filled_responses(record))
            where = " as far as the largest bucket keeps them" if cut else ""
            return "same_responses", f"better and worse responses are the same tokens{where}"
        if not self.given:
            return None
        if any(response.source.log_prob is None for response in record.responses):
            return "no_reference", "the data hold no reference log-probs of the responses"
        if any(response.truncated for response in record.responses):
            told = "a response lost its tail, and the data's log-prob is of all of it"
            return "no_reference", told
        return None

    def select(self, record: TokenizedRecord) -> TokenizedRecord:
        """A record with the responses that are learned."""
        return best(record) if self.best_only else record

    def tell(self, record: TokenizedRecord) -> Mapping[str, str]:
        """What is known of a row without reading it, by column."""
        return {
            FIELDS_COLUMN: digest_fields(record, self.fields),
            SCORE_COLUMN: score_names([record]).pop(),
            GIVEN_COLUMN: given_column(record) if self.given else "",
        }


@dataclasses.dataclass(frozen=True)
class PromptUse:
    """Prompts that responses are sampled after."""

    rollout: str
    """The recipe's section, as JSON."""
    teacher: str | None = None
    """That of its teacher, as JSON; None without one."""
    their_processor: TeacherProcessor | None = None
    """That of a teacher that is another checkpoint."""
    changes: bool = False
    """Whether objectives compare with a changed image."""
    modules: tuple[str, ...] = ()
    messages_as: MessagesAs = "last_turn"
    supervised: bool = False
    columns: tuple[str, ...] = (SOLUTION,)

    @classmethod
    def of(cls, rollout: Rollout, training: Training | None = None) -> PromptUse:
        """The use of rows whose samples are rewarded so.

        Args:
          rollout: the recipe's section.
          training: that of the training; None for one with neither teacher nor changed images.
        """
        teacher = None if training is None else training.teacher
        changes = training is not None and len(contexts_of(training)) > 1
        names = [section.type for section in rollout.rules]
        modules = {REWARDS[name].function.__module__ for name in names}
        without = {"max_failed"} if rollout.rewards else {"max_failed", "rewards"}
        return cls(
            rollout.model_dump_json(exclude=without),
            None if teacher is None else teacher.model_dump_json(),
            TeacherProcessor.of(teacher),
            changes,
            tuple(sorted(modules)),
        )

    def key(self) -> Any:
        """All that the methods depend on, as JSON."""
        key = dataclasses.asdict(self) | {"modules": ()}
        del key["their_processor"]  # as it was before rows were tokenised by it
        if self.their_processor is not None:
            key["their_processor"] = self.their_processor.fingerprint
        return key | {"asked": True} if self._asks_a_model else key

    @property
    def _asks_a_model(self) -> bool:
        """Whether a reward model is told the prompts."""
        return bool(_rollout(self.rollout).reward_models)

    def tokenize(
        self, record: Record, processor: Processor, max_prompt: int, max_response: int
    ) -> TokenizedRecord:
        """Tokens of a prompt."""
        row = tokenize(record, processor, max_prompt, max_response)
        if self.teacher is not None:
            teacher = _teacher(self.teacher)
            theirs = None if self.their_processor is None else self.their_processor.open()
            row = with_teacher(row, record, teacher, processor, theirs, max_prompt, max_response)
        if self._asks_a_model:
            row = dataclasses.replace(row, asked=dataclasses.replace(record, responses=()))
        return row

    def unfit(self, record: TokenizedRecord) -> Problem | None:
        """(reason, detail) why samples cannot be learned from; None if they can."""
        if self.changes and not (record.images or record.videos):
            return "no_other_image", "there is no image to change"
        if _rollout(self.rollout).on_policy < 1 and not record.responses:
            return "empty_response", "no response, which some batches learn from"
        try:
            for section in _rollout(self.rollout).rules:
                section.check(record.solution)
        except DataError as error:
            return "no_answer", str(error)
        return None

    def select(self, record: TokenizedRecord) -> TokenizedRecord:
        """The record."""
        return record

    def tell(self, record: TokenizedRecord) -> Mapping[str, str]:
        """What rewards compare with."""
        return {SOLUTION: json.dumps(record.solution)}


@functools.lru_cache(4)
def _rollout(text: str) -> Rollout:
    return Rollout.model_validate_json(text)


@functools.lru_cache(4)
def _teacher(text: str) -> Teacher:
    section: Teacher = pydantic.TypeAdapter(Teacher).validate_json(text)
    return section


def field_values(record: TokenizedRecord, fields: Sequence[str]) -> dict[str, np.ndarray]:
    """Name -> float32[S] or [S, t] of the fields, and of the ranks."""
    return {field: maker_of(field)(record) for field in sorted({*fields, "rank"})}


def digest_fields(record: TokenizedRecord, fields: Sequence[str]) -> str:
    """SHA-256 of `field_values`."""
    values = field_values(record, fields)
    return fingerprint_json({name: value.tolist() for name, value in values.items()})


def given_log_probs(context: TokenizedRecord) -> list[float | None]:
    """The reference's log-prob of every response, as the data give it; 0 of one that is not in
    this context."""
    return [r.source.log_prob if len(r.ids) else 0 for r in context.responses]


def given_column(record: TokenizedRecord) -> str:
    """`given_log_probs` of all contexts, as JSON."""
    return json.dumps([given_log_probs(context) for _, context in all_contexts(record)])


def best(record: TokenizedRecord) -> TokenizedRecord:
    """A record with the responses of the best rank only, where there are ranks."""
    if not record.ranked:
        return record
    rank = min(response.source.rank or 0 for response in record.responses)
    return _of_rank(record, rank)


def _of_rank(record: TokenizedRecord, rank: int) -> TokenizedRecord:
    kept = tuple(response for response in record.responses if response.source.rank == rank)
    others = tuple((name, _of_rank(other, rank)) for name, other in record.others)
    return dataclasses.replace(record, responses=kept, others=others)
