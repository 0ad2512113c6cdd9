"""How a reward model reads responses: behind critiques or not, and what it cannot read."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any

from mmpo_jax.core.errors import MmpoError
from mmpo_jax.data.critiques import evaluation, tokenize_asked, tokenize_scored
from mmpo_jax.data.records import Record, Response
from mmpo_jax.data.skipped import Problem, UnusableRow
from mmpo_jax.data.tokenization import UNLIMITED, TokenizedRecord
from mmpo_jax.models.model import Model
from mmpo_jax.objectives.registry import Scored
from mmpo_jax.recipes.scoring import Rewarding

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Reading:
    """How a reward model reads responses."""

    scored: Scored
    written: int
    """Critiques that it writes of each; 0 where they are given, or none are read."""

    @classmethod
    def of(cls, options: Rewarding, model: Model, name: str) -> Reading:
        """How the options have a model read.

        Args:
          options: of the recipe.
          model: with a reward head.
          name: of the model, for messages.

        Raises:
          MmpoError: critiques are wanted of a model that was trained without.
        """
        assert model.config.reward_head is not None
        prompt = model.config.reward_head.critique_prompt
        if prompt is None and (options.critiques or options.given_critiques):
            raise MmpoError(
                f"{name}: was trained to score responses without critiques; leave "
                "`rewarding.critiques` and `rewarding.given_critiques` out"
            )
        if prompt is None and options.temperature is not None:
            raise MmpoError(
                f"{name}: was trained to score responses without critiques, so none is sampled; "
                "leave `rewarding.temperature` out"
            )
        written = options.critiques
        if written is None:
            written = int(prompt is not None and not options.given_critiques)
        if prompt is not None and not (written or options.given_critiques):
            log.warning("%s: was trained with critiques, and reads none now", name)
        reads = written or options.given_critiques
        layout = model.config.reward_head.critique_layout
        return cls(Scored(prompt if reads else None, layout=layout), written)

    @property
    def alone(self) -> bool:
        """Whether every response stands in a prompt of its own."""
        return self.scored.layout == "one_turn" and self.scored.critique_prompt is not None

    def tokenize(
        self, record: Record, processor: Any, max_prompt: int, max_response: int
    ) -> TokenizedRecord:
        """Tokens of a record as it is before critiques are written; those of the data count where
        they are read.

        Raises:
          UnusableRow: see `tokenize_scored` and `tokenize_asked`; or a response has an image or a
            prompt of its own.
        """
        if self.alone:
            return self._tokenize_alone(record, processor, max_prompt, max_response)
        if self.written:
            plain = (dataclasses.replace(one, critique=None) for one in record.responses)
            record = dataclasses.replace(record, responses=tuple(plain))
            tokenize_asked(record, processor, self.scored)
        return self.tokenize_criticised(record, processor, max_prompt, max_response)

    def _tokenize_alone(
        self, record: Record, processor: Any, max_prompt: int, max_response: int
    ) -> TokenizedRecord:
        """The record as it is, if every response can be read in a prompt of its own."""
        prompt = self.scored.critique_prompt
        assert prompt is not None
        for response in record.responses:
            asked = evaluation(record, response, prompt)
            if not self.written:
                asked = answered(asked, [response.critique or ""])
            tokenize_scored(asked, processor, max_prompt, max_response, scored=Scored())
        row = tokenize_scored(record, processor, UNLIMITED, UNLIMITED, scored=Scored())
        told = (bool(response.critique) for response in record.responses)
        pairs = zip(row.responses, told, strict=True)
        kept = (dataclasses.replace(one, criticised=criticised) for one, criticised in pairs)
        return dataclasses.replace(row, responses=tuple(kept))

    def tokenize_criticised(
        self, record: Record, processor: Any, max_prompt: int, max_response: int
    ) -> TokenizedRecord:
        """Tokens of a record with the critiques that its responses have.

        Raises:
          UnusableRow: see `tokenize`.
        """
        row = tokenize_scored(record, processor, max_prompt, max_response, scored=self.scored)
        if row.others:
            raise UnusableRow("own_prompt", "responses have images or prompts of their own")
        return row

    def unfit(self, record: TokenizedRecord) -> Problem | None:
        """Why a row cannot be scored; None where it can."""
        if not record.responses:
            return "empty_response", "no response to score"
        given = self.scored.critique_prompt is not None and not self.written
        if given and not all(response.criticised for response in record.responses):
            return "no_critique", "a response without a critique, and given ones are to be read"
        return None


def answered(asked: Record, critiques: Sequence[str]) -> Record:
    """A prompt that holds question and response, with the critiques of it as its answers."""
    return dataclasses.replace(asked, responses=tuple(map(Response.of, critiques)))
