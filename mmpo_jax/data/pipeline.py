"""The order of training batches: a grain pipeline whose position is saved in checkpoints."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import grain
import jax
import numpy as np

from mmpo_jax.data.batching import pad_batch
from mmpo_jax.data.processor import Processor
from mmpo_jax.data.tokenization import TokenizedRecord
from mmpo_jax.models.batch import Batch
from mmpo_jax.recipe import Lengths


@dataclasses.dataclass(frozen=True)
class Example:
    """A record in its contexts, with the numbers its objectives need beside the log-probs."""

    contexts: tuple[TokenizedRecord, ...]
    """One row of prompts each, of as many responses; the main one first."""
    fields: Mapping[str, np.ndarray]
    """name -> float32[S] or [S, t]."""
    reference: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    """`sums` float32[C, S] or `log_probs` float32[C, S, t]; empty where none was computed."""

    @property
    def id(self) -> str:
        return self.contexts[0].id


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainBatch:
    """N records in C contexts each: B = N * C prompts, the contexts of a record side by side."""

    prompts: Batch
    reference: dict[str, jax.Array]
    """`sums` float32[B, S] or `log_probs` float32[B, S, T] of a reference that was computed
    before; empty where there is none."""
    fields: dict[str, jax.Array]
    """name -> float32[N, S] or [N, S, T], see `objectives.registry.FIELDS`."""


@dataclasses.dataclass(frozen=True)
class HostBatch:
    """What one step consumes on this process."""

    arrays: TrainBatch
    """NumPy, micro-batches stacked on the leading axis."""
    ids: tuple[str, ...]
    """Ids of all rows of the global batch."""
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """What is to be reported of it beside what the loss reports."""


def training_batches(
    examples: Sequence[Example],
    processor: Processor,
    lengths: Lengths,
    *,
    seed: int,
    epochs: int,
    batch_size: int,
    micro_batch_size: int,
) -> grain.DatasetIterator:
    """An iterator over `HostBatch`es, shuffled anew in every epoch.

    Batches are cut from the whole sequence of epochs, so only the very last one may be filled up.
    Every process walks the same order and takes its own rows, hence shapes agree across hosts.
    `get_state` and `set_state` hold the position.
    """
    make = batch_maker(examples, processor, lengths, batch_size, micro_batch_size)
    batches = batch_order(len(examples), seed, epochs, batch_size).map(make)
    return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)))


def batch_order(num_examples: int, seed: int, epochs: int, batch_size: int) -> grain.MapDataset:
    """Which examples every batch holds, as lists of their indices."""
    order = grain.MapDataset.range(num_examples).seed(seed).shuffle().repeat(epochs)
    return order.batch(batch_size, drop_remainder=False, batch_fn=list)


def num_batches(num_examples: int, epochs: int, batch_size: int) -> int:
    """How many batches `training_batches` gives."""
    return -(-num_examples * epochs // batch_size)


def batch_maker(
    examples: Sequence[Example],
    processor: Processor,
    lengths: Lengths,
    batch_size: int,
    micro_batch_size: int,
) -> Callable[[list[int]], HostBatch]:
    """Makes batches of the examples with given indices, at most `batch_size` of them."""
    processes, process = jax.process_count(), jax.process_index()
    records = [record for example in examples for record in example.contexts]
    num_responses = max(len(record.responses) for record in records)
    contexts = max(len(example.contexts) for example in examples)

    def make(indices: list[int]) -> HostBatch:
        chosen = [examples[int(index)] for index in indices]
        records = [record for example in chosen for record in example.contexts]
        prompt = max(len(record.prompt_ids) for record in records)
        response = max(len(r.ids) for record in records for r in record.responses)
        micro_batches = []
        for start in range(0, batch_size, micro_batch_size):
            rows = micro_batch_size // processes
            first = start + process * rows
            own = chosen[first : first + rows]
            prompts = pad_batch(
                [context for example in own for context in _filled(example, contexts)],
                processor,
                rows=rows * contexts,
                prompt_sizes=[size for size in lengths.prompt if size >= prompt][:1],
                response_sizes=[size for size in lengths.response if size >= response][:1],
                num_responses=num_responses,
                num_slots=max(record.num_slots for record in records),
            )
            size = prompts.response_ids.shape[1:]
            reference = {
                name: np.concatenate(
                    _pad([e.reference[name] for e in own], (rows, contexts, *size)[: like.ndim + 1])
                )
                for name, like in examples[0].reference.items()
            }
            fields = {
                name: _pad([e.fields[name] for e in own], (rows, *size)[: like.ndim + 1])
                for name, like in examples[0].fields.items()
            }
            # NumPy here, jax.Array on the mesh, as in `pad_batch`.
            arrays: dict[str, Any] = {"reference": reference, "fields": fields}
            micro_batches.append(TrainBatch(prompts, **arrays))
        stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *micro_batches)
        return HostBatch(stacked, tuple(example.id for example in chosen))

    return make


def _filled(example: Example, contexts: int) -> list[TokenizedRecord | None]:
    return [*example.contexts, *[None] * (contexts - len(example.contexts))]


def _pad(values: Sequence[np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    """float32[shape]: the values one after another, and zeros beyond them."""
    padded = np.zeros(shape, np.float32)
    for row, value in zip(padded, values, strict=False):
        row[tuple(slice(length) for length in value.shape)] = value
    return padded
