"""The order of training batches: a grain pipeline whose position is saved in checkpoints."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import grain
import jax

from mmpo_jax.data.batching import bucket
from mmpo_jax.data.examples import Example, rows_of, sizes_of_examples
from mmpo_jax.data.lengths import Lengths
from mmpo_jax.data.packed_batches import Packing, plan_packing
from mmpo_jax.data.processor import Processor
from mmpo_jax.data.train_batch import TrainBatch, batch_maker
from mmpo_jax.parallel.mesh import WHOLE, Share


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
    packed_over: int | None = None,
    share: Share = WHOLE,
) -> grain.DatasetIterator:
    """An iterator over `HostBatch`es, shuffled anew in every epoch.

    Of several parts, each is shuffled by itself, and they are mixed evenly: every stretch of an
    epoch holds as large a share of each as the whole.

    Batches are cut from the whole sequence of epochs, so only the very last one may be filled up.
    Every process walks the same order and takes its `share` of the rows of a batch, hence shapes
    agree across hosts.
    `get_state` and `set_state` hold the position. Examples of one context are packed where it is
    given over how many devices, `packed_over`.
    """
    order = batch_order(parts or [MixtureEntry(len(examples))], seed, epochs, batch_size)
    sizes = batch_size, micro_batch_size
    packing = packing_of(examples, processor, order, *sizes, packed_over)
    make = batch_maker(examples, processor, lengths, *sizes, packing, share)
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


def packing_of(
    examples: Sequence[Example],
    processor: Processor,
    batches: Sequence[Sequence[int]],
    batch_size: int,
    micro_batch_size: int,
    shards: int | None,
) -> Packing | None:
    """How batches of examples are packed over so many devices; None where they are padded, which
    those of several contexts are.

    Args:
      examples: of the run.
      processor: of the checkpoint.
      batches: indices of examples.
      batch_size, micro_batch_size: examples, over all devices.
      shards: devices that batches are split over; None for no packing.
    """
    if shards is None or len(examples[0].contexts) > 1:
        return None
    return plan_packing(
        batches,
        sizes_of_examples(examples),
        batch_size=batch_size,
        micro_batch_size=micro_batch_size,
        shards=shards,
        width=processor.config.decoder.hidden_size,
    )


def held_out_batches(
    examples: Sequence[Example],
    processor: Processor,
    lengths: Lengths,
    batch_size: int,
    packed_over: int | None = None,
    share: Share = WHOLE,
) -> Iterator[TrainBatch]:
    """All examples once, in order, all with the T that the longest response needs; packed as those
    of `training_batches`."""
    size = bucket(int(rows_of(examples).sizes.response.max()), lengths.response)
    one = lengths.model_copy(update={"response": (size,)})
    batches = [
        list(range(start, min(start + batch_size, len(examples))))
        for start in range(0, len(examples), batch_size)
    ]
    packing = packing_of(examples, processor, batches, batch_size, batch_size, packed_over)
    make = batch_maker(examples, processor, one, batch_size, batch_size, packing, share)
    for indices in batches:
        batch = make(indices)
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
