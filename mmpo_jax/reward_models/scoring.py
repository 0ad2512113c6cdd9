"""Responses scored by a reward model: critiques written or given, and the mean of their rewards."""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from mmpo_jax.checkpoints.checkpoint import Checkpoint
from mmpo_jax.data.batching import fitting_lengths
from mmpo_jax.data.critiques import evaluation
from mmpo_jax.data.lengths import Lengths
from mmpo_jax.data.records import Record, Response
from mmpo_jax.data.skipped import Problem, UnusableRow
from mmpo_jax.data.tokenization import TokenizedRecord
from mmpo_jax.data.usable import limits_of, read_or_not, with_responses
from mmpo_jax.models.precision import inference_dtype
from mmpo_jax.objectives.registry import Scored
from mmpo_jax.recipes.sampling import Decoding
from mmpo_jax.recipes.scoring import Rewarding
from mmpo_jax.reward_models.critiques import Critic, Critiques, critique_stage, write_critiques
from mmpo_jax.reward_models.reading import Reading, answered
from mmpo_jax.reward_models.rewards import reward_records, reward_stage

log = logging.getLogger(__name__)

SEVERAL_AT = 0.7
"""Temperature of several critiques, where none is given."""


@dataclasses.dataclass(frozen=True)
class Rewarded:
    """What a reward model says of a record's R responses."""

    rewards: Float[np.ndarray, " R"]
    """float64[R]: the mean over the critiques of each; NaN of a response that has a problem."""
    std: Float[np.ndarray, " R"]
    """float64[R]: standard deviation over the critiques, divided by their number; 0 of one."""
    critiques: list[list[str]]
    """Critiques of each response; empty lists where none were read."""
    problems: list[Problem | None]
    """Why a response has no reward, such as a critique that does not fit into `lengths`; None of
    one that has."""


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
    once for critiques and once for rewards. A response that cannot be read has no reward, and the
    others beside it have theirs.

    Args:
      checkpoint: with a reward head, its parameters on the mesh.
      records: with responses.
      reading: how they are read.
      options: of the recipe.
      lengths: bucket sizes; None for those that fit, and no limits.
      mesh: the devices.
      folder: of the stages of both; None where nothing is kept.
      seed: of sampled critiques.
      round_index: of the update, 0 outside of training.
    """
    if reading.alone:
        return _score_alone(
            checkpoint,
            records,
            reading,
            options,
            lengths,
            mesh,
            folder=folder,
            seed=seed,
            round_index=round_index,
        )
    critiques = _critiques(checkpoint, records, reading, options, mesh, folder, seed, round_index)
    limits = limits_of(lengths)

    def tokenized(record: Record) -> TokenizedRecord:
        return reading.tokenize_criticised(record, checkpoint.processor, *limits)

    found = [_Criticised.of(*pair, tokenized) for pair in zip(records, critiques, strict=True)]
    _tell_problems([problem for one in found for problem in one.problems])
    rows = [one.row for one in found if one.row is not None]
    rewards = iter(_rewards(checkpoint, rows, options, lengths, mesh, folder) if rows else [])
    return [one.averaged([] if one.row is None else next(rewards)) for one in found]


def _score_alone(
    checkpoint: Checkpoint,
    records: Sequence[Record],
    reading: Reading,
    options: Rewarding,
    lengths: Lengths | None,
    mesh: Mesh,
    *,
    folder: str | None,
    seed: int,
    round_index: int,
) -> list[Rewarded]:
    """`score_responses` where a prompt holds question and response: the critiques are its answers,
    whose rewards are read at their ends. All critiques of a response share its prompt."""
    prompt = reading.scored.critique_prompt
    assert prompt is not None
    alone: list[Record] = []
    places: list[list[int]] = []
    for record in records:
        distinct: dict[Any, int] = {}
        places.append([])
        for response in record.responses:
            key = response.turns, None if reading.written else response.critique
            if key not in distinct:
                distinct[key] = len(alone)
                alone.append(dataclasses.replace(record, responses=(response,)))
            places[-1].append(distinct[key])
    critiques = _critiques(checkpoint, alone, reading, options, mesh, folder, seed, round_index)
    asked: dict[int, Record] = {}
    problems: dict[int, Problem] = {}
    for place, (record, own) in enumerate(zip(alone, critiques, strict=True)):
        (response,), (texts,), (problem,) = record.responses, own.texts, own.problems
        if problem is None:
            try:
                made = answered(evaluation(record, response, prompt), texts)
                asked[place] = dataclasses.replace(made, id=f"{record.id}#{place}")
            except UnusableRow as error:
                problem = error.reason, error.detail
        if problem is not None:
            problems[place] = problem
    plain = Reading(Scored(), 0)
    rows = [*asked.values()]
    read = score_responses(
        checkpoint, rows, plain, options, lengths, mesh, folder=folder, seed=seed
    )
    found = dict(zip(asked, read, strict=True))
    for place, one in found.items():
        problem = next(filter(None, one.problems), None)
        if problem is not None:
            problems[place] = problem
    return [_together(own, critiques, found, problems) for own in places]


def _together(
    places: Sequence[int],
    critiques: Sequence[Critiques],
    found: Mapping[int, Rewarded],
    problems: Mapping[int, Problem],
) -> Rewarded:
    """What is said of a record whose responses were scored alone, each under its place."""
    nothing = np.full(1, np.nan)
    own = [nothing if place in problems else found[place].rewards for place in places]
    means, stds = (np.array([f(part) for part in own]) for f in (np.mean, np.std))
    texts = [critiques[place].texts[0] for place in places]
    return Rewarded(means, stds, texts, [problems.get(place) for place in places])


@dataclasses.dataclass(frozen=True)
class _Criticised:
    """A record's responses with their critiques, each combination once."""

    row: TokenizedRecord | None
    """The combinations that can be read; None where none can."""
    critiques: list[list[str]]
    """Critiques of every response of the whole record."""
    places: list[list[int]]
    """Which of the combinations are those of every response: one for each critique, or for none; of
    a response that has a problem, none."""
    problems: list[Problem | None]
    """Why every response has no reward."""

    @classmethod
    def of(
        cls, record: Record, critiques: Critiques, tokenized: Callable[[Record], TokenizedRecord]
    ) -> _Criticised:
        """Equal ones are scored once, so that ties are ties on every backend.

        A response has no reward if it cannot be read behind one of its critiques, as the mean would
        be another's.

        Args:
          record: with responses.
          critiques: of these.
          tokenized: makes tokens of a record whose responses have one critique each.
        """
        distinct: dict[Any, int] = {}
        combined: list[Response] = []
        own: list[list[int]] = []
        problems = [*critiques.problems]
        for response, texts, problem in zip(
            record.responses, critiques.texts, problems, strict=True
        ):
            each: list[str | None] = [*texts] or [None]
            own.append([])
            for critique in each if problem is None else ():
                key = response.turns, critique
                if key not in distinct:
                    distinct[key] = len(combined)
                    combined.append(dataclasses.replace(response, critique=critique))
                own[-1].append(distinct[key])
        whole = dataclasses.replace(record, responses=tuple(combined))
        row, rejected = read_or_not(whole, tokenized)
        for number, places in enumerate(own):
            told = next((rejected[place] for place in places if rejected[place]), None)
            problems[number] = problems[number] or told
        read = sorted({place for n, part in enumerate(own) if not problems[n] for place in part})
        if not read:
            row = None
        elif row is None or len(row.responses) > len(read):  # another critique of theirs is not
            kept = with_responses(whole, [place in read for place in range(len(combined))])
            row = tokenized(kept)
        at = [
            [] if problem else [read.index(place) for place in part]
            for part, problem in zip(own, problems, strict=True)
        ]
        return cls(row, critiques.texts, at, problems)

    def averaged(self, rewards: Sequence[float]) -> Rewarded:
        """Means over the critiques, in float64.

        Args:
          rewards: of the combinations.
        """
        values = np.array(rewards, np.float64)
        own = [values[places] if places else np.full(1, np.nan) for places in self.places]
        means, stds = (np.array([f(part) for part in own]) for f in (np.mean, np.std))
        return Rewarded(means, stds, self.critiques, self.problems)


def _tell_problems(problems: Sequence[Problem | None]) -> None:
    """Says how many responses have no reward, why, and of the first what exactly is wrong."""
    found = [problem for problem in problems if problem is not None]
    if found:
        counts = Counter(reason for reason, _ in found).most_common()
        log.warning(
            "%d of %d responses have no reward: %s; the first: %s",
            len(found),
            len(problems),
            ", ".join(f"{reason} {count}" for reason, count in counts),
            found[0][1],
        )


def _critiques(
    checkpoint: Checkpoint,
    records: Sequence[Record],
    reading: Reading,
    options: Rewarding,
    mesh: Mesh,
    folder: str | None,
    seed: int,
    round_index: int,
) -> list[Critiques]:
    """Of every response its critiques: written now, those of the data, or none."""
    prompt = reading.scored.critique_prompt
    if prompt is None:
        return [*map(Critiques.none, records)]
    if not reading.written:
        return [*map(Critiques.given, records)]
    usual = SEVERAL_AT if reading.written > 1 else 0.0
    decoding = Decoding(
        num_samples=reading.written,
        temperature=usual if options.temperature is None else options.temperature,
        max_new_tokens=options.max_new_tokens,
    )
    critic = Critic(checkpoint, reading.scored, decoding, mesh, options.batch_size, seed)
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
