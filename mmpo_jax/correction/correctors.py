"""Who finds what is wrong with rejected responses: rules, or a language model that is asked."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from mmpo_jax.checkpoints.checkpoint import load_processor
from mmpo_jax.core.prompts import fill
from mmpo_jax.correction.codebook import Codebook
from mmpo_jax.correction.corrections import Answers, Case, Error, Found, kept
from mmpo_jax.correction.prompts import CORRECT_PROMPT, errors_schema, read_errors
from mmpo_jax.correction.short_answers import short_answer_error
from mmpo_jax.data.processor import Processor
from mmpo_jax.data.records import Record
from mmpo_jax.data.skipped import Problem
from mmpo_jax.data.usable import unsupported
from mmpo_jax.feedback.judge import check_failed
from mmpo_jax.feedback.judges import text_model
from mmpo_jax.feedback.models import Models
from mmpo_jax.feedback.text_model import Ask, TextModel, Unread, ask_until_read, speaking_key
from mmpo_jax.picture_world.corrections import caption_errors
from mmpo_jax.picture_world.language import ANSWERS
from mmpo_jax.picture_world.world import Scene
from mmpo_jax.recipes.command_recipes import CorrectRecipe
from mmpo_jax.recipes.correction import CheckpointCorrecting, Correcting, RuleCorrecting

CORRECT_RULES = 1
"""Part of the key of what is found: changes with how it is looked for, asked and read."""


class Corrector(Protocol):
    """Finds errors."""

    key: Any
    """All that they depend on beside the pairs, as JSON."""
    sees: bool
    """Whether they depend on the images and videos."""

    def check(self) -> None:
        """Finds what can be known to be wrong before anything heavy starts.

        Raises:
          MmpoError: what the user can mend.
        """

    def unfit(self, record: Record) -> Problem | None:
        """Why a pair's record cannot be asked about; None where it can."""
        ...

    def find(self, cases: Sequence[Case]) -> list[Found]:
        """What is wrong with the rejected response of every pair, in order.

        Raises:
          TooManyFailed: nobody could say it of more of them than may be.
        """
        ...

    def answers(self, case: Case) -> Answers:
        """What is answered to the questions about a pair."""
        ...

    def release(self) -> None:
        """Lets go of what it holds on the devices."""


class RuleCorrector:
    """Rules: rows with a scene as their answer are of the picture world, others short answers."""

    sees = False

    def __init__(self, config: RuleCorrecting, codebook: Codebook, max_errors: int, seed: int):
        """
        Args:
          config: of the recipe.
          codebook: whose kinds of errors are asked about, and how short answers are.
          max_errors: of a response.
          seed: of the wording of short answers.
        """
        self.config, self.codebook = config, codebook
        self.max_errors, self.seed = max_errors, seed
        told = codebook.model_dump(mode="json")
        self.key = [CORRECT_RULES, "rule", config.max_words, told, max_errors, seed]

    def check(self) -> None:
        """Nothing: a rule needs nothing."""

    def unfit(self, record: Record) -> Problem | None:
        """None: a rule looks at texts."""
        del record
        return None

    def find(self, cases: Sequence[Case]) -> list[Found]:
        """See `Corrector`."""
        return [self._find(case) for case in cases]

    def answers(self, case: Case) -> Answers:
        """See `Corrector`; the picture world has its own words."""
        if scene_of(case.solution) is None:
            return self.codebook.answers
        return ANSWERS[True], ANSWERS[False]

    def release(self) -> None:
        """Nothing: a rule holds nothing."""

    def _find(self, case: Case) -> Found:
        scene = scene_of(case.solution)
        if scene is None:
            return short_answer_error(case, self.codebook, self.config.max_words, self.seed)
        errors = (
            Error(error.kind, error.wrong, error.yes, error.no)
            for error in caption_errors(case.rejected, scene)
            if error.kind in self.codebook.names
        )
        return _found(kept(errors, self.max_errors))


class ModelCorrector:
    """A language model that gets both responses and the codebook, and writes the questions."""

    def __init__(
        self,
        model: TextModel,
        options: Correcting,
        codebook: Codebook,
        max_errors: int,
        key: Any,
        check: Callable[[], Any],
        takes: Callable[[Record], Problem | None],
    ):
        """
        Args:
          model: that is asked.
          options: how.
          codebook: whose kinds of errors are looked for.
          max_errors: of a response.
          key: of the model.
          check: that it is there.
          takes: why the model cannot be shown what a record shows; None where it can.
        """
        self.model, self.options, self.codebook = model, options, codebook
        self.max_errors, self.check, self.takes = max_errors, check, takes
        self.sees = options.show_image
        self.prompt = options.prompt or CORRECT_PROMPT
        told = [self.prompt, codebook.listing(), codebook.names, self.sees, max_errors]
        self.key = [CORRECT_RULES, key, speaking_key(options), told]

    def unfit(self, record: Record) -> Problem | None:
        """See `Corrector`."""
        return self.takes(record) if self.sees else None

    def find(self, cases: Sequence[Case]) -> list[Found]:
        """See `Corrector`."""

        def read(number: int, reply: str) -> tuple[Error, ...]:
            return read_errors(reply, cases[number].rejected, self.codebook.names)

        asks = [self._ask(case) for case in cases]
        schema = errors_schema(self.codebook.names)
        replies = ask_until_read(self.model, asks, read, self.options.attempts, schema)
        found = [self._found(reply) for reply in replies]
        failures = [one.failure for one in found]
        told = "asking for corrections"
        check_failed(failures, self.options.max_failed, told, "corrector.max_failed")
        return found

    def answers(self, case: Case) -> Answers:
        """See `Corrector`."""
        del case
        return self.codebook.answers

    def release(self) -> None:
        """Lets go of the model."""
        self.model.release()

    def _ask(self, case: Case) -> Ask:
        text = fill(
            self.prompt,
            question=case.question,
            chosen=case.chosen,
            rejected=case.rejected,
            codebook=self.codebook.listing(),
            max_errors=str(self.max_errors),
        )
        images, videos = (case.images, case.videos) if self.sees else ((), ())
        room = self.options.max_new_tokens
        return Ask(case.id, text, images, videos=videos, max_new_tokens=room)

    def _found(self, reply: tuple[Error, ...] | Unread) -> Found:
        if not isinstance(reply, Unread):
            return _found(kept(reply, self.max_errors))
        return Found(
            reason="not_corrected",
            detail=f"{reply.reason}: {reply.detail}",
            failure=reply.reason,
            raw=reply.raw,
        )


def make_corrector(recipe: CorrectRecipe, codebook: Codebook, models: Models) -> Corrector:
    """The corrector of a recipe.

    Args:
      recipe: of `mmpo correct`.
      codebook: that it names.
      models: what language models run on.

    Raises:
      MmpoError: a checkpoint or a key is not there.
    """
    section = recipe.corrector
    if isinstance(section, RuleCorrecting):
        return RuleCorrector(section, codebook, recipe.max_errors, recipe.seed)
    model, key, check = text_model(section, section, models)

    def takes(record: Record) -> Problem | None:
        if isinstance(section, CheckpointCorrecting):
            return unsupported(record, processor())
        return None

    @functools.cache
    def processor() -> Processor:
        assert isinstance(section, CheckpointCorrecting)
        return load_processor(*models.name(section))

    return ModelCorrector(model, section, codebook, recipe.max_errors, key, check, takes)


def scene_of(solution: Any) -> Scene | None:
    """The scene that a row has as its answer; None of a row that is not the picture world's."""
    if not isinstance(solution, dict):
        return None
    try:
        return Scene.from_dict(solution)
    except ValueError:
        return None


def _found(errors: tuple[Error, ...]) -> Found:
    if errors:
        return Found(errors)
    return Found(reason="no_error", detail="nothing is wrong that the codebook has")
