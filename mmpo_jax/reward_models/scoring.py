"""Responses scored by a reward model: critiques written or given, and the mean of their rewards."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from mmpo_jax.checkpoints.checkpoint import Checkpoint
from mmpo_jax.core.errors import MmpoError
from mmpo_jax.data.batching import fitting_lengths
from mmpo_jax.data.critiques import tokenize_scored
from mmpo_jax.data.lengths import Lengths
from mmpo_jax.data.records import Record, Response
from mmpo_jax.data.skipped import Problem
from mmpo_jax.data.tokenization import RowRejected, TokenizedRecord
from mmpo_jax.data.usable import limits_of
from mmpo_jax.models.model import Model
from mmpo_jax.models.precision import inference_dtype
from mmpo_jax.objectives.registry import Scored
from mmpo_jax.recipes.sampling import Decoding
from mmpo_jax.recipes.scoring import Rewarding
from mmpo_jax.reward_models.critiques import Critic, critique_stage, write_critiques
from mmpo_jax.reward_models.rewards import reward_records, reward_stage

log = logging.getLogger(__name__)

SEVERAL_AT = 0.7
"""Temperature of several critiques, where none is given."""


@dataclasses.dataclass(frozen=True)
class Rewarded:
    """What a reward model says of a record's R responses."""

    rewards: Float[np.ndarray, " R"]
    """float64[R]: the mean over the critiques of each; NaN where there is none that can be read."""
    std: Float[np.ndarray, " R"]
    """float64[R]: standard deviation over the critiques, divided by their number; 0 of one."""
    critiques: list[list[str]]
    """Critiques of each response; empty lists where none were read."""
    problem: Problem | None = None
    """Why there are no rewards, where the critiques make the record too long."""


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
        written = options.critiques
        if written is None:
            written = int(prompt is not None and not options.given_critiques)
        if prompt is not None and not (written or options.given_critiques):
            log.warning("%s: was trained with critiques, and reads none now", name)
        reads = written or options.given_critiques
        return cls(Scored(prompt if reads else None), written)

    def tokenize(
        self, record: Record, processor: Any, max_prompt: int, max_response: int
    ) -> TokenizedRecord:
        """Tokens of a record with the critiques that its responses have.

        Raises:
          RowRejected: see `tokenize_scored`; or a response has an image or a prompt of its own.
        """
        row = tokenize_scored(record, processor, max_prompt, max_response, scored=self.scored)
        if row.others:
            raise RowRejected("own_prompt", "responses have images or prompts of their own")
        return row

    def unfit(self, record: TokenizedRecord) -> Problem | None:
        """Why a row cannot be scored; None where it can."""
        if not record.responses:
            return "empty_response", "no response to score"
        given = self.scored.critique_prompt is not None and not self.written
        if given and not all(response.criticised for response in record.responses):
            return "no_critique", "a response without a critique, and given ones are to be read"
        return None


def score_responses(
    checkpoint: Checkpoint,
    records: Sequence[Record],
    reading: Reading,
    options: Rewarding,
    lengths: Lengths | None,
    mesh: Mesh,
    *,
    folder: str | None,
    seed: int,
    round_index: int = 0,
) -> list[Rewarded]:
    """Rewards of all responses: critiques first, if they are written.

    All responses of a record, with all of their critiques, stand behind one prompt, which is run
    once for critiques and once for rewards.

    Args:
      checkpoint: with a reward head, its parameters on the mesh.
      records: with responses that `reading` can tokenise.
      reading: how they are read.
      options: of the recipe.
      lengths: bucket sizes; None for those that fit, and no limits.
      mesh: the devices.
      folder: of the stages of both; None where nothing is kept.
      seed: of sampled critiques.
      round_index: of the update, 0 outside of training.
    """
    critiques = _critiques(checkpoint, records, reading, options, mesh, folder, seed, round_index)
    tokenized: list[TokenizedRecord] = []
    found: list[_Criticised] = []
    for record, of_record in zip(records, critiques, strict=True):
        criticised = _Criticised.of(record, of_record)
        try:
            row = reading.tokenize(criticised.record, checkpoint.processor, *limits_of(lengths))
        except RowRejected as error:
            log.warning("%s: no rewards: %s: %s", record.id, error.reason, error.detail)
            problem = error.reason, error.detail
            found.append(dataclasses.replace(criticised, problem=problem))
            continue
        tokenized.append(row)
        found.append(criticised)
    rewards = _rewards(checkpoint, tokenized, options, lengths, mesh, folder) if tokenized else []
    of_rows = iter(rewards)
    return [one.averaged(None if one.problem else next(of_rows)) for one in found]


@dataclasses.dataclass(frozen=True)
class _Criticised:
    """A record's responses with their critiques, each combination once."""

    record: Record
    critiques: list[list[str]]
    """Critiques of every response of the whole record."""
    places: list[list[int]]
    """Which of the combinations are those of every response: one for each critique, or for none."""
    problem: Problem | None = None

    @classmethod
    def of(cls, record: Record, critiques: list[list[str]]) -> _Criticised:
        """Equal ones are scored once, so that ties are ties on every backend."""
        distinct: dict[Any, int] = {}
        responses: list[Response] = []
        places: list[list[int]] = []
        for response, own in zip(record.responses, critiques, strict=True):
            places.append([])
            each: list[str | None] = [*own] or [None]
            for critique in each:
                made = dataclasses.replace(response, critique=critique)
                key = response.turns, critique
                if key not in distinct:
                    distinct[key] = len(responses)
                    responses.append(made)
                places[-1].append(distinct[key])
        return cls(dataclasses.replace(record, responses=tuple(responses)), critiques, places)

    def averaged(self, rewards: Sequence[float] | None) -> Rewarded:
        """Means over the critiques, in float64.

        Args:
          rewards: of the combinations; None where there are none.
        """
        values = np.full(len(self.record.responses), np.nan)
        if rewards is not None:
            values = np.array(rewards, np.float64)
        own = [values[places] for places in self.places]
        means, stds = (np.array([f(part) for part in own]) for f in (np.mean, np.std))
        return Rewarded(means, stds, self.critiques, self.problem)


def _critiques(
    checkpoint: Checkpoint,
    records: Sequence[Record],
    reading: Reading,
    options: Rewarding,
    mesh: Mesh,
    folder: str | None,
    seed: int,
    round_index: int,
) -> list[list[list[str]]]:
    """Of every response its critiques: written now, those of the data, or none."""
    prompt = reading.scored.critique_prompt
    if prompt is None:
        return [[[] for _ in record.responses] for record in records]
    if not reading.written:
        return [[[response.critique or ""] for response in r.responses] for r in records]
    usual = SEVERAL_AT if reading.written > 1 else 0.0
    decoding = Decoding(
        num_samples=reading.written,
        temperature=usual if options.temperature is None else options.temperature,
        max_new_tokens=options.max_new_tokens,
    )
    critic = Critic(checkpoint, prompt, decoding, mesh, options.batch_size, seed)
    if folder is None:
        return write_critiques(critic, records, round_index)
    return critique_stage(critic, records, folder)


def _rewards(
    checkpoint: Checkpoint,
    records: Sequence[TokenizedRecord],
    options: Rewarding,
    lengths: Lengths | None,
    mesh: Mesh,
    folder: str | None,
) -> list[list[float]]:
    lengths, size = lengths or fitting_lengths(records), options.batch_size
    dtype: str = options.compute_dtype
    if dtype == "auto":
        dtype = inference_dtype(checkpoint.params).name
    if folder is None:
        return reward_records(checkpoint, records, lengths, mesh, size, dtype)
    table = reward_stage(
        checkpoint, records, lengths, mesh, folder=folder, batch_size=size, compute_dtype=dtype
    )
    return table["rewards"].to_pylist()
