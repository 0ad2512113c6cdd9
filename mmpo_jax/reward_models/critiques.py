"""Critiques that a reward model writes of responses, all of a prompt's behind one pass over it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import pyarrow as pa
from jax.sharding import Mesh

from mmpo_jax.checkpoints.checkpoint import Checkpoint
from mmpo_jax.core import progress
from mmpo_jax.core.files import fingerprint_json
from mmpo_jax.core.stages import Stage, run_stage
from mmpo_jax.data.batching import fitting_sizes
from mmpo_jax.data.critiques import tokenize_asked
from mmpo_jax.data.lengths import Lengths
from mmpo_jax.data.records import Record, Response
from mmpo_jax.data.skipped import Problem
from mmpo_jax.data.tokenization import TokenizedRecord
from mmpo_jax.data.tokenized_rows import fingerprint_records
from mmpo_jax.data.usable import read_or_not
from mmpo_jax.generation.responses import (
    GENERATE_RULES,
    PROMPTS_PER_PART,
    SampleCount,
    read_response,
    sample_tokens,
)
from mmpo_jax.objectives.registry import Scored
from mmpo_jax.recipes.sampling import Decoding


@dataclasses.dataclass(frozen=True)
class Critiques:
    """What is said of a record's responses."""

    texts: list[list[str]]
    """The critiques of each; none of one that has a problem."""
    problems: list[Problem | None]
    """Why a response cannot be asked about; None of one that can."""

    @classmethod
    def given(cls, record: Record) -> Critiques:
        """Those of the data; an empty one stands for none."""
        texts = [[response.critique or ""] for response in record.responses]
        return cls(texts, [None] * len(texts))

    @classmethod
    def none(cls, record: Record) -> Critiques:
        """No critiques."""
        return cls([[] for _ in record.responses], [None] * len(record.responses))


@dataclasses.dataclass(frozen=True)
class Critic:
    """A reward model that writes critiques, and how."""

    checkpoint: Checkpoint
    """The model, its parameters on the mesh."""
    scored: Scored
    """How critiques are asked for."""
    decoding: Decoding
    """How tokens are chosen; so many critiques of every response."""
    mesh: Mesh
    batch_size: int
    """Prompts at a time, with all of their responses."""
    seed: int
    """Seed of the samples."""


@dataclasses.dataclass(frozen=True)
class Asked:
    """A record whose responses are asked about."""

    row: TokenizedRecord | None
    """The distinct responses, each with what asks for its critique; None where none can be asked
    about."""
    names: tuple[str, ...]
    """A name for each, by what it says."""
    places: tuple[int | None, ...]
    """Which of them every response of the record is; None of one that cannot be asked about."""
    problems: tuple[Problem | None, ...]
    """Why every response cannot be asked about."""

    @classmethod
    def of(cls, record: Record, critic: Critic) -> Asked:
        """The record as a critic is asked about it; in `one_turn` with its only response."""

        def tokenized(asked: Record) -> TokenizedRecord:
            return tokenize_asked(asked, critic.checkpoint.processor, critic.scored)

        distinct: dict[str, Response] = {}
        found = []
        for response in record.responses:
            said = fingerprint_json([[turn.role, turn.text] for turn in response.turns])
            name = f"{record.id}#{said[:16]}"
            distinct.setdefault(name, response)
            found.append(name)
        once = dataclasses.replace(record, responses=tuple(distinct.values()))
        row, rejected = read_or_not(once, tokenized)
        told = dict(zip(distinct, rejected, strict=True))
        names = tuple(name for name in distinct if told[name] is None)
        if row is not None and not row.responses:
            row = dataclasses.replace(row, id=names[0])
        places = tuple(None if told[name] else names.index(name) for name in found)
        return cls(row, names, places, tuple(told[name] for name in found))

    def critiques(self, texts: Mapping[str, list[str]]) -> Critiques:
        """Those of every response, of name -> critiques."""
        own = [[] if place is None else texts[self.names[place]] for place in self.places]
        return Critiques(own, [*self.problems])


def write_critiques(
    critic: Critic, records: Sequence[Record], round_index: int = 0
) -> list[Critiques]:
    """Samples critiques of every response of every record.

    A critique depends on the seed, the round, the record's id and what the response says, not on
    the others beside it; equal responses of a record have the same critiques. A response that
    cannot be asked about has none, and the reason.

    Args:
      critic: writes them.
      records: with responses.
      round_index: of the update, 0 outside of training.
    """
    asked = [Asked.of(record, critic) for record in records]
    return _written(critic, asked, round_index, SampleCount())


def critique_stage(critic: Critic, records: Sequence[Record], folder: str) -> list[Critiques]:
    """`write_critiques` part by part, as the stage `critiques` of a folder."""
    asked = [Asked.of(record, critic) for record in records]
    checkpoint = critic.checkpoint
    stage = Stage(
        folder=folder,
        name="critiques",
        inputs={
            "model": checkpoint.fingerprint,
            "rows": fingerprint_records([one.row for one in asked if one.row is not None]),
            **checkpoint.processor.fingerprints(),
        },
        settings={
            "rules": GENERATE_RULES,
            "decoding": critic.decoding.model_dump(include=set(Decoding.model_fields)),
            "seed": critic.seed,
            "places": fingerprint_json([one.places for one in asked]),
        },
        num_parts=max(1, -(-len(records) // PROMPTS_PER_PART)),
    )
    count = SampleCount()

    def make_part(part: int) -> pa.Table:
        activity.start_at(part * PROMPTS_PER_PART)
        progress.tell()
        of_part = asked[part * PROMPTS_PER_PART : (part + 1) * PROMPTS_PER_PART]
        texts = [one.texts for one in _written(critic, of_part, 0, count)]
        return pa.table({"critiques": pa.array(texts, pa.list_(pa.list_(pa.string())))})

    with progress.doing("critiques", len(records), first="compiling") as activity:
        table = run_stage(stage, make_part).table
    count.log_summary("critiques")
    texts = table["critiques"].to_pylist()
    return [Critiques(own, [*one.problems]) for own, one in zip(texts, asked, strict=True)]


def _written(
    critic: Critic, asked: Sequence[Asked], round_index: int, count: SampleCount
) -> list[Critiques]:
    """The critiques, of records with as many distinct responses at a time."""
    kinds: dict[int, list[int]] = {}
    for number, one in enumerate(asked):
        kinds.setdefault(len(one.names), []).append(number)
    texts: dict[int, Mapping[str, list[str]]] = {at: {} for at in kinds.pop(0, ())}
    for numbers in kinds.values():
        of_kind = [asked[number] for number in numbers]
        texts |= zip(numbers, _of_kind(critic, of_kind, round_index, count), strict=True)
    return [one.critiques(texts[number]) for number, one in enumerate(asked)]


def _of_kind(
    critic: Critic, asked: Sequence[Asked], round_index: int, count: SampleCount
) -> list[dict[str, list[str]]]:
    """Of every record, name of a response -> its critiques."""
    rows = [one.row for one in asked if one.row is not None]
    sampled = sample_tokens(
        critic.checkpoint,
        rows,
        critic.decoding,
        _few_lengths(rows),
        critic.mesh,
        batch_size=critic.batch_size,
        seed=critic.seed,
        round_index=round_index,
        count=count,
        beginnings=[one.names for one in asked] if rows[0].responses else None,
    )
    processor, each = critic.checkpoint.processor, critic.decoding.num_samples
    found = []
    for one, tokens in zip(asked, sampled, strict=True):
        said = [read_response(processor, row)[0] for row in tokens]
        parts = (said[start : start + each] for start in range(0, len(said), each))
        found.append(dict(zip(one.names, parts, strict=True)))
    return found


def _few_lengths(rows: Sequence[TokenizedRecord]) -> Lengths:
    """Bucket sizes, fewer than otherwise: every pair of them is compiled."""
    return Lengths(
        prompt=fitting_sizes([len(row.prompt_ids) for row in rows], 2),
        response=fitting_sizes([len(one.ids) for row in rows for one in row.responses] or [1], 1),
    )
