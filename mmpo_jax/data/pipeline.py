"""The order of training batches: a grain pipeline whose position is saved in checkpoints."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import grain
import jax
import numpy as np

from mmpo_jax.data.batching import bucket, pad_batch
from mmpo_jax.data.contexts import MAIN
from mmpo_jax.data.lengths import Lengths
from mmpo_jax.data.processor import Processor
from mmpo_jax.data.tokenization import TokenizedRecord
from mmpo_jax.models.batch import Batch


@dataclasses.dataclass(frozen=True)
class Example:
    """A record in its contexts, with the numbers its objectives need beside the log-probs."""

    contexts: tuple[TokenizedRecord | None, ...]
    """One row of prompts each, of as many responses; the main one first. None for a context that
    other records have and this one has not."""
    fields: Mapping[str, np.ndarray]
    """name -> float32[S] or [S, t]."""
    reference: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    """`sums` float32[C, S] or `log_probs` float32[C, S, t]; empty where none was computed."""
    names: tuple[str, ...] = (MAIN,)
    """Of the contexts; the same in all examples."""

    @property
    def id(self) -> str:
        first = self.contexts[0]
        assert first is not None
        return first.id

    @property
    def rows(self) -> list[TokenizedRecord]:
        """The contexts it has."""
        return [context for context in self.contexts if context is not None]


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
class MixtureEntry:
    """A data set of a mixture."""

    size: int
    weight: float = 1.0
    """How often its rows are seen in an epoch."""

    @property
    def per_epoch(self) -> int:
        """Rows in an epoch; one at least."""
        return max(1, round(self.size * self.weight))


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
    parts: Sequence[MixtureEntry] = (),
    workers: int = 1,
) -> grain.DatasetIterator:
    """An iterator over `HostBatch`es, shuffled anew in every epoch.

    Of several parts, each is shuffled by itself, and they are mixed evenly: every stretch of an
    epoch holds as large a share of each as the whole.

    Batches are cut from the whole sequence of epochs, so only the very last one may be filled up.
    Every process walks the same order and takes its own rows, hence shapes agree across hosts.
    `get_state` and `set_state` hold the position.
    """
    make = batch_maker(examples, processor, lengths, batch_size, micro_batch_size)
    order = batch_order(parts or [MixtureEntry(len(examples))], seed, epochs, batch_size)
    options = grain.ReadOptions(num_threads=workers, prefetch_buffer_size=4)
    return iter(order.map(make).to_iter_dataset(options))


def mixed_order(parts: Sequence[MixtureEntry], seed: int, epochs: int) -> grain.MapDataset:
    """Indices of examples for all epochs, the examples of the parts standing one after another."""
    orders, first = [], 0
    for part in parts:
        indices = grain.MapDataset.range(first, first + part.size).seed(seed).shuffle()
        # Goes on where the last epoch ended, so that of half a part the other half comes next.
        orders.append(indices.repeat())
        first += part.size
    seen = [part.per_epoch for part in parts]
    return grain.MapDataset.mix(orders, weights=seen)[: epochs * sum(seen)]


def held_out_batches(
    examples: Sequence[Example], processor: Processor, lengths: Lengths, batch_size: int
) -> Iterator[TrainBatch]:
    """All examples once, in order, all with the T that the longest response needs."""
    longest = max(len(r.ids) for example in examples for row in example.rows for r in row.responses)
    size = bucket(longest, lengths.response)
    one = lengths.model_copy(update={"response": (size,)})
    make = batch_maker(examples, processor, one, batch_size, batch_size)
    for start in range(0, len(examples), batch_size):
        batch = make(list(range(start, min(start + batch_size, len(examples)))))
        yield jax.tree.map(lambda leaf: leaf[0], batch.arrays)


def batch_order(
    parts: Sequence[MixtureEntry], seed: int, epochs: int, batch_size: int
) -> grain.MapDataset:
    """Which examples every batch holds, as lists of their indices."""
    order = mixed_order(parts, seed, epochs)
    return order.batch(batch_size, drop_remainder=False, batch_fn=list)


def seen_rows(
    parts: Sequence[MixtureEntry], seed: int, epochs: int, batch_size: int, steps: int
) -> set[int]:
    """Indices of the examples that the first `steps` batches hold."""
    order = batch_order(parts, seed, epochs, batch_size)
    return {int(row) for step in range(min(steps, len(order))) for row in order[step]}


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
    records = [record for example in examples for record in example.rows]
    num_responses = max(len(record.responses) for record in records)
    contexts = len(examples[0].contexts)
    shown = any(record.shows_later for record in records)

    def make(indices: list[int]) -> HostBatch:
        chosen = [examples[int(index)] for index in indices]
        records = [record for example in chosen for record in example.rows]
        prompt = max(len(record.prompt_ids) for record in records)
        response = max(len(r.ids) for record in records for r in record.responses)
        micro_batches = []
        for start in range(0, batch_size, micro_batch_size):
            rows = micro_batch_size // processes
            first = start + process * rows
            own = chosen[first : first + rows]
            prompts = pad_batch(
                [context for example in own for context in example.contexts],
                processor,
                rows=rows * contexts,
                prompt_sizes=[size for size in lengths.prompt if size >= prompt][:1],
                response_sizes=[size for size in lengths.response if size >= response][:1],
                num_responses=num_responses,
                num_slots=max(record.num_slots for record in records),
                shown=shown,
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


def _pad(values: Sequence[np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    """float32[shape]: the values one after another, and zeros beyond them."""
    padded = np.zeros(shape, np.float32)
    for row, value in zip(padded, values, strict=False):
        row[tuple(slice(length) for length in value.shape)] = value
    return padded
