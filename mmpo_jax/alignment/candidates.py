"""The responses of a round: what each of its sources gives, put together in one table.

Every source that samples is a stage of its own: `generate` for the policy, `generate-NAME` for the
others; those of servers are in `served_candidates.py`. Where there is more than the policy, the
stage `responses` has them all.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyarrow as pa
from jax.sharding import Mesh

from mmpo_jax.alignment.changed_prompts import changed_prompts, under_their_prompts
from mmpo_jax.alignment.served_candidates import client_of, served_stage, unservable
from mmpo_jax.chat.server import key_variables, read_key
from mmpo_jax.checkpoints.checkpoint import Checkpoint, load_processor, open_checkpoint
from mmpo_jax.core.errors import DataError
from mmpo_jax.core.files import fingerprint_items, fingerprint_json
from mmpo_jax.core.processes import on_one
from mmpo_jax.core.stages import Stage, StageOutput, run_told_stage
from mmpo_jax.data.batching import fitting_lengths
from mmpo_jax.data.records import Record, Response
from mmpo_jax.data.skipped import SkippedRow
from mmpo_jax.data.sources import RecordSet
from mmpo_jax.data.tokenization import (
    TokenizedRecord,
    tokenize_prompt,
    tokenize_records,
)
from mmpo_jax.data.usable import unsupported
from mmpo_jax.feedback.implicit import have_same_tokenizer
from mmpo_jax.feedback.served import Servers
from mmpo_jax.generation.responses import GENERATED, generate_stage
from mmpo_jax.recipes.align_recipe import AlignRecipe
from mmpo_jax.recipes.candidates import (
    Candidate,
    CheckpointCandidates,
    DataCandidates,
    EditedImageCandidates,
    HiddenImageCandidates,
    PolicyCandidates,
    ServedCandidates,
    data_candidates,
)

log = logging.getLogger(__name__)

RESPONSES_RULES = 1
"""Part of the key of the responses of several sources: changes with how they are put together."""

CANDIDATES = GENERATED.append(pa.field("source", pa.string()))
"""Columns of the stage `responses`. `token_ids` is null where the text is what is known: of
responses of the data, of servers, and of a checkpoint with another tokenizer than the policy's."""


@dataclasses.dataclass(frozen=True)
class Asked:
    """The prompts of a round, and the policy that the sources are compared with."""

    start: Checkpoint
    records: Sequence[Record]
    tokenized: Sequence[TokenizedRecord]
    """The same prompts as the policy takes them."""
    recipe: AlignRecipe
    mesh: Mesh
    folder: str
    index: int
    """Of the round."""
    servers: Servers | None = None
    """Clients of the run; None where no source is served."""
    finished: Callable[[pa.Table], None] = lambda rows: None
    """Is given the rows that sources have finished while there is more to come."""


def responses_name(recipe: AlignRecipe) -> str:
    """The name of the stage that has all responses of a round."""
    alone = recipe.sentences is None and _policy_alone(recipe)
    return "generate" if alone else "responses"


def _policy_alone(recipe: AlignRecipe) -> bool:
    return all(isinstance(source, PolicyCandidates) for source in recipe.candidates)


def check_candidates(recipe: AlignRecipe) -> None:
    """Finds checkpoints that are not there before anything heavy starts.

    Raises:
      MmpoError: naming what is missing.
    """
    for source in recipe.candidates:
        if isinstance(source, CheckpointCandidates):
            load_processor(source.model, source.template)


def check_servers(recipe: AlignRecipe, servers: Servers) -> None:
    """Finds servers that are not up, and keys that are missing, before anything heavy starts.

    Raises:
      MmpoError: naming what is missing.
    """
    for source in recipe.candidates:
        if isinstance(source, ServedCandidates) and source.command is None:
            client_of(source, source.drawn(recipe.sampling), servers, "").check()
        elif isinstance(source, ServedCandidates):
            on_one(functools.partial(_check_key, source))


def _check_key(source: ServedCandidates) -> None:
    """Looks whether the key is there, of the process that asks; it is handed to no other."""
    read_key(source)


def load_prompts(recipe: AlignRecipe) -> RecordSet:
    """The prompts of a recipe, with those of the rows' responses that are candidates.

    Raises:
      DataError: they cannot be read, or hold no response that is a candidate.
    """
    of_data = data_candidates(recipe.candidates)
    if of_data is None:
        return recipe.data.load(supervised=False)
    record_set = recipe.data.load(supervised=True)
    records = [
        dataclasses.replace(record, responses=_given(record, of_data))
        for record in record_set.records
    ]
    given = sum(len(record.responses) for record in records)
    if not given:
        raise DataError(
            f"candidates: data: no row of {record_set.name} has a response that is one answer to "
            "its prompt"
        )
    log.info("%s: %d responses of the data are candidates", record_set.name, given)
    return dataclasses.replace(record_set, records=records)


def _given(record: Record, source: DataCandidates) -> tuple[Response, ...]:
    """The responses of a row that are one answer to its own prompt, as samples are."""
    best = min((r.rank for r in record.responses if r.rank is not None), default=None)
    return tuple(
        response
        for response in record.responses
        if [turn.role for turn in response.turns] == ["assistant"]
        and response.images is None
        and response.prompt is None
        and (source.responses == "all" or response.rank == best)
    )


def round_responses(asked: Asked) -> StageOutput:
    """All responses to the prompts of a round, those of a prompt together and numbered in the order
    of the sources: `GENERATED`, or `CANDIDATES` where there is more than the policy.

    Raises:
      DataError: a source cannot be asked any of the prompts.
    """
    sources = asked.recipe.candidates
    if _policy_alone(asked.recipe):
        return _generated(asked, sources[0])[0]
    tables: dict[str, pa.Table] = {}
    inputs: dict[str, str] = {}
    given: set[str] = set()
    """Sources whose rows went to `asked.finished`."""

    def finished_by(name: str, rows: pa.Table) -> None:
        for earlier in tables.keys() - given:  # was there before this run, or is the data's
            asked.finished(tables[earlier])
        given.update(tables, [name])
        asked.finished(rows)

    for source in sources:
        if isinstance(source, DataCandidates):
            table = _of_data(asked.records)
            tables[source.name] = table
            inputs[source.name] = fingerprint_items(table.to_pylist())
        else:
            finished = functools.partial(finished_by, source.name)
            making = dataclasses.replace(asked, finished=finished)
            output, same_tokens = _generated(making, source)
            inputs[source.name] = output.fingerprint
            tables[source.name] = output.table if same_tokens else _without_ids(output.table)
    ids = [record.id for record in asked.records]
    settings = {
        "rules": RESPONSES_RULES,
        "sources": list(tables),
        "with_ids": [table["token_ids"].null_count == 0 for table in tables.values()],
        "prompts": fingerprint_json(ids),
    }

    def make_part(_: int) -> pa.Table:
        return _together(ids, tables)

    stage = Stage(asked.folder, "responses", inputs, settings)
    output = run_told_stage(stage, make_part)
    counts = Counter(output.table["source"].to_pylist())
    told = ", ".join(f"{name} {counts[name]}" for name in tables)
    log.info("responses: %s", told)
    return output


def _generated(asked: Asked, source: Candidate) -> tuple[StageOutput, bool]:
    """(what a source samples, whether its ids are the policy's tokens)."""
    assert not isinstance(source, DataCandidates)
    if isinstance(source, ServedCandidates):
        return _served(asked, source), False
    recipe, generator = asked.recipe, asked.start
    prompts, lengths = asked.tokenized, recipe.lengths
    policy = isinstance(source, PolicyCandidates)
    # Sources draw independently of each other.
    seed = recipe.seed if policy else _seed(recipe.seed, source.name)
    if isinstance(source, CheckpointCandidates):
        generator = _opened(source, asked)
        prompts = _prompts_of(source, generator, asked.records)
        lengths = fitting_lengths(prompts)
    sampling = source.drawn(recipe.sampling)
    told = _as_it_is
    if isinstance(source, EditedImageCandidates | HiddenImageCandidates):
        prompts = _changed(source, asked, sampling.num_samples, seed)
        if source.per_sample:
            sampling = sampling.model_copy(update={"num_samples": 1})
            told = under_their_prompts
    output = generate_stage(
        generator,
        prompts,
        sampling,
        lengths,
        asked.mesh,
        folder=asked.folder,
        batch_size=sampling.batch_size,
        seed=seed,
        round_index=asked.index,
        name="generate" if policy else f"generate-{source.name}",
        finished=lambda rows: asked.finished(told(rows)),
    )
    output = dataclasses.replace(output, table=told(output.table))
    same = generator is asked.start
    return output, same or have_same_tokenizer(generator.processor, asked.start.processor)


def _as_it_is(table: pa.Table) -> pa.Table:
    return table


def _served(asked: Asked, source: ServedCandidates) -> StageOutput:
    assert asked.servers is not None
    records, skipped = [], []
    for record in asked.records:
        problem = unservable(record)
        if problem is None:
            records.append(record)
        else:
            skipped.append(SkippedRow(source.name, record.row, record.id, *problem))
    _tell_left_out(source, skipped, len(asked.records))
    sampling = source.drawn(asked.recipe.sampling)
    return served_stage(
        source,
        records,
        sampling,
        asked.start,
        asked.mesh,
        client_of(source, sampling, asked.servers, asked.start.fingerprint),
        folder=asked.folder,
        seed=_seed(asked.recipe.seed, source.name),
        round_index=asked.index,
        withheld=key_variables(asked.recipe) - {source.api_key_env},
        finished=asked.finished,
    )


def _seed(seed: int, name: str) -> int:
    """A seed of 32 bits of a source's own."""
    return int(fingerprint_json([seed, name])[:8], 16)


def _opened(source: CheckpointCandidates, asked: Asked) -> Checkpoint:
    """The checkpoint before its weights are read, or the policy where it is that."""
    opened = open_checkpoint(source.model, asked.recipe.attention, source.template)
    start = asked.start
    same = opened.fingerprint == start.fingerprint
    same = same and opened.processor.fingerprints() == start.processor.fingerprints()
    dtype = asked.recipe.inference_dtype
    return start if same else dataclasses.replace(opened, dtype=dtype)


def _prompts_of(
    source: CheckpointCandidates, generator: Checkpoint, records: Sequence[Record]
) -> list[TokenizedRecord]:
    """The prompts as another model takes them, without those that it cannot be asked."""
    problems = [(record, unsupported(record, generator.processor)) for record in records]
    skipped = [
        SkippedRow(source.name, record.row, record.id, *problem)
        for record, problem in problems
        if problem is not None
    ]
    shown = [record for record, problem in problems if problem is None]
    prompts, rejected = tokenize_records(
        shown, generator.processor, None, source.name, tokenize_prompt
    )
    _tell_left_out(source, [*skipped, *rejected], len(records))
    return prompts


def _changed(
    source: EditedImageCandidates | HiddenImageCandidates, asked: Asked, num_samples: int, seed: int
) -> list[TokenizedRecord]:
    """The prompts of which less is shown, without those that have nothing to change."""
    of_round = _seed(seed, f"round {asked.index}")
    processor, records = asked.start.processor, asked.tokenized
    prompts, skipped = changed_prompts(source, records, processor, num_samples, of_round)
    _tell_left_out(source, skipped, len(records))
    return prompts


def _tell_left_out(source: Candidate, skipped: Sequence[SkippedRow], total: int) -> None:
    if not skipped:
        return
    told = f"candidates: {source.name} is not asked {len(skipped)} of {total} prompts, such as"
    first = skipped[0]
    if len(skipped) == total:
        raise DataError(f"{told} {first.id!r}: {first.reason}: {first.detail}")
    log.warning("%s %r: %s: %s", told, first.id, first.reason, first.detail)


def _of_data(records: Sequence[Record]) -> pa.Table:
    """The responses that the records have, as rows of what is generated."""
    rows = [
        {
            "prompt_id": record.id,
            "sample": sample,
            "text": response.text,
            "finished": response.finished,
            "token_ids": response.token_ids,
        }
        for record in records
        for sample, response in enumerate(record.responses)
    ]
    return pa.Table.from_pylist(rows, schema=GENERATED)


def _without_ids(table: pa.Table) -> pa.Table:
    place = GENERATED.get_field_index("token_ids")
    nulls = pa.nulls(table.num_rows, GENERATED.field(place).type)
    return table.set_column(place, GENERATED.field(place), nulls)


def _together(ids: Sequence[str], tables: Mapping[str, pa.Table]) -> pa.Table:
    """The rows of all sources by prompt, whose samples are numbered anew."""
    by_prompt: dict[str, list[dict[str, Any]]] = {name: [] for name in ids}
    for source, table in tables.items():
        for row in table.to_pylist():
            rows = by_prompt[row["prompt_id"]]
            rows.append(row | {"sample": len(rows), "source": source})
    rows = [row for of_prompt in by_prompt.values() for row in of_prompt]
    return pa.Table.from_pylist(rows, schema=CANDIDATES)
