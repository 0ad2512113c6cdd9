"""Responses to records: batches of prompts through the sampler, texts out."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np
import pyarrow as pa
from jax.sharding import Mesh

from mmpo_jax.checkpoints.checkpoint import Checkpoint
from mmpo_jax.core import progress
from mmpo_jax.core.errors import DataError
from mmpo_jax.core.files import fingerprint_items
from mmpo_jax.core.stages import Stage, StageOutput, run_stage
from mmpo_jax.data.lengths import Lengths
from mmpo_jax.data.processor import Processor
from mmpo_jax.data.tokenization import TokenizedRecord
from mmpo_jax.generation.caches import state_tokens
from mmpo_jax.generation.refill import Work, choose_layout, sample_batches
from mmpo_jax.generation.sampler import NOT_FINITE, sample_keys
from mmpo_jax.inference.loop import TokenCount
from mmpo_jax.inference.plan import PlannedBatch, plan_padded
from mmpo_jax.models.batch import Batch
from mmpo_jax.models.precision import check_finite, inference_dtype
from mmpo_jax.parallel.mesh import WHOLE, Share, batch_shards
from mmpo_jax.recipes.sampling import Decoding

PROMPTS_PER_PART = 256
"""A kill loses at most this many prompts' worth of a stage."""

GENERATE_RULES = 2
"""Part of the key of responses: changes with what makes them or what is written of them."""

GENERATED = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("sample", pa.int32()),
        ("text", pa.string()),
        ("num_tokens", pa.int32()),
        ("finished", pa.bool_()),
        ("token_ids", pa.list_(pa.int32())),
    ]
)


@dataclasses.dataclass(frozen=True, eq=False)
class Generated:
    """One sampled response."""

    prompt_id: str
    sample: int
    text: str
    num_tokens: int
    """EOS included."""
    finished: bool
    """Whether it ended by itself and not by the length limit."""
    token_ids: np.ndarray
    """What was sampled, EOS included, int32[num_tokens]."""


def generate_responses(
    checkpoint: Checkpoint,
    records: Sequence[TokenizedRecord],
    decoding: Decoding,
    lengths: Lengths,
    mesh: Mesh,
    *,
    batch_size: int,
    seed: int,
    round_index: int = 0,
    count: SampleCount | None = None,
) -> list[Generated]:
    """`sample_tokens` as texts: sorted as the records are, samples in order."""
    sampled = sample_tokens(
        checkpoint,
        records,
        decoding,
        lengths,
        mesh,
        batch_size=batch_size,
        seed=seed,
        round_index=round_index,
        count=count,
    )
    return [
        _generated(checkpoint.processor, record.id, number, row)
        for record, samples in zip(records, sampled, strict=True)
        for number, row in enumerate(samples)
    ]


def _generated(processor: Processor, prompt_id: str, number: int, row: np.ndarray) -> Generated:
    text, length, finished = read_response(processor, row)
    return Generated(prompt_id, number, text, length, finished, row[:length])


def sample_tokens(
    checkpoint: Checkpoint,
    records: Sequence[TokenizedRecord],
    decoding: Decoding,
    lengths: Lengths,
    mesh: Mesh,
    *,
    batch_size: int,
    seed: int,
    round_index: int = 0,
    count: SampleCount | None = None,
    beginnings: Sequence[Sequence[str]] | None = None,
) -> list[np.ndarray]:
    """Samples `decoding.num_samples` responses to every record's prompt.

    A response depends on the seed, the round, the prompt's id and the sample's number only. Where
    an id comes again, the numbers go on, so all its samples are drawn independently.

    Samples may also go on from E beginnings of answers to each prompt, so many from each. A prompt
    is run once for all of them.

    Args:
      checkpoint: its parameters on the mesh.
      records: tokenized; their responses are read as beginnings only.
      decoding: how tokens are chosen.
      lengths: bucket sizes of the prompts, and of beginnings.
      mesh: the devices.
      batch_size: prompts at a time, rounded up to what the mesh needs.
      seed: of the run.
      round_index: of the alignment round or of the update, 0 outside of one.
      count: adds up what was computed.
      beginnings: names of the responses of every record, E each, which stand for the prompt's id;
        None where samples go on from the prompt.

    Returns:
      int32[n, max_new_tokens] for every record, see `read_response`; of beginnings [E * n, ...],
      those of the first first.

    Raises:
      DataError: an image cannot be read, the model's positions end before a response may, or it
        computes logits that are not finite.
    """
    model, params, processor = checkpoint.model, checkpoint.params, checkpoint.processor
    begun = beginnings is not None
    names = [[record.id] for record in records] if beginnings is None else beginnings
    several = len(names[0]) if names else 1
    assert all(len(own) == several for own in names), "as many beginnings of every record"
    limit = model.config.decoder.position_limit
    behind = [
        max((len(response.ids) for response in record.responses), default=0) if begun else 0
        for record in records
    ]
    longest = max((len(record.prompt_ids) for record in records), default=0)
    pairs = zip(records, behind, strict=True)
    last = max((len(record.whole_prompt) + more for record, more in pairs), default=0)
    if limit is not None and last + decoding.max_new_tokens > limit:
        raise DataError(
            f"a prompt of {last} tokens and {decoding.max_new_tokens} new ones go beyond the "
            f"{limit} positions of {processor.folder}; lower max_new_tokens"
        )
    numbers, repeats = np.zeros((2, len(records), several), np.uint32)
    seen: Counter[str] = Counter()
    for row, own in enumerate(names):
        for column, name in enumerate(own):
            numbers[row, column], repeats[row, column] = prompt_number(name), seen[name]
            seen[name] += 1

    shards = batch_shards(mesh)
    whole = decoding.model_copy(update={"num_samples": several * decoding.num_samples})
    longest += several * max(behind, default=0)
    dtype = inference_dtype(params)
    states = state_tokens(model.config.decoder, dtype)
    layout = choose_layout(len(records), longest, whole, batch_size, shards, states)
    plan = plan_padded(records, processor, lengths, rows=layout.batch, with_responses=begun)
    # Shorter prompts first: rows grow with them.
    plan.sort(key=lambda batch: batch.computed)
    draw = functools.partial(sample_keys, seed, round_index, num_samples=decoding.num_samples)
    batches = [_with_keys(batch, layout.batch, draw, numbers, repeats) for batch in plan]
    work = Work()
    found = sample_batches(
        model,
        params,
        batches,
        layout,
        mesh,
        decoding=whole,
        eos_ids=processor.eos_ids,
        pad_id=processor.pad_id,
        begun=begun,
        work=work,
    )
    sampled: dict[int, np.ndarray] = {}
    for number, tokens in found:
        is_finite = bool((tokens != NOT_FINITE).all())
        check_finite("logits", [(records[number].id, is_finite)], dtype.name)
        sampled[number] = tokens
    if count is not None:
        for batch in plan:
            count.prompts.add(batch)
        count.add_samples(sampled.values(), work.computed, processor)
    return [sampled[number] for number in range(len(records))]


@dataclasses.dataclass
class SampleCount:
    """How many of the tokens that sampling computed are no padding."""

    prompts: TokenCount = dataclasses.field(default_factory=TokenCount)
    samples: TokenCount = dataclasses.field(default_factory=TokenCount)
    """Sampled tokens; places without a sample are computed too."""

    def add_samples(
        self, sampled: Iterable[np.ndarray], computed: int, processor: Processor
    ) -> None:
        """Counts samples.

        Args:
          sampled: int32[n, T] for every prompt.
          computed: tokens that were computed for them.
          processor: knows where samples end.
        """
        for samples in sampled:
            self.samples.tokens += sum(read_length(processor, row)[0] for row in samples)
        self.samples.computed += computed

    def log_summary(self, name: str) -> None:
        """Says both in the log, where anything was computed."""
        self.prompts.log_summary(f"{name}, prompts")
        self.samples.log_summary(f"{name}, samples")


def _with_keys(
    batch: PlannedBatch, rows: int, draw: Callable, numbers: np.ndarray, repeats: np.ndarray
) -> PlannedBatch:
    """A batch of prompts, a process's own, together with the keys of the samples of all of them.

    Args:
      batch: makes a `Batch`.
      rows: of it.
      draw: `sample_keys` of the prompts' numbers and repeats.
      numbers, repeats: uint32[N, E] of all records and their beginnings, see `sample_keys`.
    """

    def make(share: Share = WHOLE) -> tuple[Batch, jax.Array]:
        arrays: Any = np.zeros((2, rows, numbers.shape[1]), np.uint32)
        for number, row in batch.places:
            arrays[:, row] = numbers[number], repeats[number]
        keys = draw(prompt_numbers=arrays[0].ravel(), repeats=arrays[1].ravel())
        return batch.make(share), keys.reshape(rows, -1)

    return dataclasses.replace(batch, make=make)


def generate_stage(
    checkpoint: Checkpoint,
    records: Sequence[TokenizedRecord],
    decoding: Decoding,
    lengths: Lengths,
    mesh: Mesh,
    *,
    folder: str,
    batch_size: int,
    seed: int,
    round_index: int = 0,
    name: str = "generate",
    finished: Callable[[pa.Table], None] = lambda rows: None,
) -> StageOutput:
    """`generate_responses` part by part, as a stage of a folder.

    A checkpoint without its parameters, as `open_checkpoint` gives it, is read where something is
    left to do, and let go of afterwards. `finished` is given the responses as they come, see
    `run_stage`.

    Returns:
      The fields of `Generated`, a row per response.
    """
    stage = Stage(
        folder=folder,
        name=name,
        inputs={
            "model": checkpoint.fingerprint,
            "prompts": fingerprint_items(
                [
                    r.id,
                    r.prompt_ids.tolist(),
                    [image.fingerprint() for image in r.images],
                    [video.fingerprint() for video in r.videos],
                    *([] if r.seen is None else [r.seen.kept.tolist()]),
                ]
                for r in records
            ),
            **checkpoint.processor.fingerprints(),
        },
        settings={
            "rules": GENERATE_RULES,
            "decoding": decoding.model_dump(include=set(Decoding.model_fields)),
            "seed": seed,
            "round": round_index,
            **({} if checkpoint.dtype is None else {"dtype": checkpoint.dtype}),
        },
        num_parts=max(1, -(-len(records) // PROMPTS_PER_PART)),
    )

    def make_part(part: int) -> pa.Table:
        activity.start_at(part * PROMPTS_PER_PART)
        progress.tell()
        responses = generate_responses(
            loaded(),
            records[part * PROMPTS_PER_PART : (part + 1) * PROMPTS_PER_PART],
            decoding,
            lengths,
            mesh,
            batch_size=batch_size,
            seed=seed,
            round_index=round_index,
            count=count,
        )
        columns = [[getattr(row, name) for row in responses] for name in GENERATED.names]
        return pa.table(columns, schema=GENERATED)

    loaded = functools.cache(lambda: checkpoint.reloaded(mesh))
    count = SampleCount()
    with progress.doing(stage.name, len(records), "prompts", "compiling") as activity:
        output = run_stage(stage, make_part, finished)
    count.log_summary(stage.name)
    return output


def prompt_number(prompt_id: str) -> int:
    """A 32-bit number for a prompt id, the same everywhere."""
    return int.from_bytes(hashlib.sha256(prompt_id.encode()).digest()[:4], "big")


def read_response(processor: Processor, tokens: np.ndarray) -> tuple[str, int, bool]:
    """(text, number of tokens with EOS, whether it ended by itself) of sampled tokens int32[T]."""
    length, finished = read_length(processor, tokens)
    return processor.decode(tokens[:length].tolist()), length, finished


def read_length(processor: Processor, tokens: np.ndarray) -> tuple[int, bool]:
    """(number of tokens with EOS, whether it ended by itself) of sampled tokens int32[T]."""
    ends = np.flatnonzero(np.isin(tokens, processor.eos_ids))
    return (int(ends[0]) + 1, True) if len(ends) else (len(tokens), False)
