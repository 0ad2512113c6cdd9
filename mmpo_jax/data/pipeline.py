"""The order of training batches: a grain pipeline whose position is saved in checkpoints."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import grain
import jax
import numpy as np

from mmpo_jax.data.batching import pad_batch
from mmpo_jax.data.processor import Processor
from mmpo_jax.data.tokenization import TokenizedRecord
from mmpo_jax.recipe import Lengths


@dataclasses.dataclass(frozen=True)
class HostBatch:
    """What one step consumes on this process."""

    arrays: Any
    """(Batch, per-response fields), NumPy, micro-batches stacked on the leading axis."""
    ids: tuple[str, ...]
    """Ids of all rows of the global batch."""


@dataclasses.dataclass(frozen=True)
class Example:
    """A tokenized record with the numbers its objective needs beside the log-probs."""

    record: TokenizedRecord
    fields: dict[str, np.ndarray]
    """name -> float32[R]."""


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
    make = _batch_maker(examples, processor, lengths, batch_size, micro_batch_size)
    order = grain.MapDataset.range(len(examples)).seed(seed).shuffle().repeat(epochs)
    batches = order.batch(batch_size, drop_remainder=False, batch_fn=list).map(make)
    return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)))


def num_batches(num_examples: int, epochs: int, batch_size: int) -> int:
    """How many batches `training_batches` gives."""
    return -(-num_examples * epochs // batch_size)


def _batch_maker(
    examples: Sequence[Example],
    processor: Processor,
    lengths: Lengths,
    batch_size: int,
    micro_batch_size: int,
) -> Callable[[list[int]], HostBatch]:
    processes, process = jax.process_count(), jax.process_index()
    num_responses = max(len(example.record.responses) for example in examples)

    def make(indices: list[int]) -> HostBatch:
        chosen = [examples[int(index)] for index in indices]
        prompt = max(len(example.record.prompt_ids) for example in chosen)
        response = max(len(r.ids) for example in chosen for r in example.record.responses)
        micro_batches = []
        for start in range(0, batch_size, micro_batch_size):
            rows = micro_batch_size // processes
            first = start + process * rows
            own = chosen[first : first + rows]
            batch = pad_batch(
                [example.record for example in own],
                processor,
                rows=rows,
                prompt_sizes=[size for size in lengths.prompt if size >= prompt][:1],
                response_sizes=[size for size in lengths.response if size >= response][:1],
                num_responses=num_responses,
                num_slots=max(example.record.num_slots for example in chosen),
            )
            micro_batches.append((batch, _stack_fields(examples[0], own, rows, num_responses)))
        arrays = jax.tree.map(lambda *leaves: np.stack(leaves), *micro_batches)
        return HostBatch(arrays, tuple(example.record.id for example in chosen))

    return make


def _stack_fields(
    template: Example, own: Sequence[Example], rows: int, num_responses: int
) -> dict[str, np.ndarray]:
    """name -> float32[rows, R], zeros where there is no response."""
    stacked = {}
    for name in template.fields:
        values = np.zeros((rows, num_responses), np.float32)
        for row, example in enumerate(own):
            values[row, : len(example.fields[name])] = example.fields[name]
        stacked[name] = values
    return stacked
