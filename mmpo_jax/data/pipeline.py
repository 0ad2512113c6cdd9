"""The order of training batches: a grain pipeline whose position is saved in checkpoints."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, overload

import grain
import jax
import numpy as np

from mmpo_jax.data.amounts import Amounts, preference_pairs
from mmpo_jax.data.batching import bucket, pad_batch
from mmpo_jax.data.contexts import MAIN
from mmpo_jax.data.lengths import Lengths
from mmpo_jax.data.packed_batches import Packing, plan_packing
from mmpo_jax.data.packing import Size, pack_batch, sizes_of
from mmpo_jax.data.processor import Processor
from mmpo_jax.data.tokenization import TokenizedRecord
from mmpo_jax.data.tokenized_rows import KnownRows, known
from mmpo_jax.models.batch import Batch, PackedBatch
from mmpo_jax.parallel.mesh import WHOLE, Share

USEFUL_SHARE = "useful_tokens"
"""The metric that says which share of the tokens of a batch is no padding."""


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
    """Names of the contexts; the same in all examples."""

    @property
    def id(self) -> str:
        first = self.contexts[0]
        assert first is not None
        return first.id

    @property
    def rows(self) -> list[TokenizedRecord]:
        """The contexts it has."""
        return [context for context in self.contexts if context is not None]

    @property
    def ranks(self) -> list[float]:
        """Ranks of the main context's own responses; none where no objective reads them."""
        main, ranks = self.rows[0], self.fields.get("rank", ())
        return [
            float(rank)
            for rank, response in zip(ranks, main.responses, strict=False)
            if len(response.ids) and not response.mismatched
        ]


class Examples(Sequence[Example]):
    """Examples of records, each made when it is asked for."""

    def __init__(self, rows: KnownRows, names: tuple[str, ...] = (MAIN,)):
        """
        Args:
          rows: the records.
          names: of the contexts; the same in all examples.
        """
        self.rows, self.names = rows, names

    def make(self, record: TokenizedRecord) -> Example:
        """The example of a record; here without numbers."""
        return Example((record,), {}, names=self.names)

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, place: int) -> Example: ...
    @overload
    def __getitem__(self, place: slice) -> list[Example]: ...
    def __getitem__(self, place: int | slice) -> Example | list[Example]:
        if isinstance(place, slice):
            return [self.make(record) for record in self.rows[place]]
        return self.make(self.rows[place])

    def __iter__(self) -> Iterator[Example]:
        return map(self.make, self.rows)


def rows_of(examples: Sequence[Example]) -> KnownRows:
    """The records of examples, in all their contexts where they are at hand."""
    if isinstance(examples, Examples):
        return examples.rows
    return known([record for example in examples for record in example.rows])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainBatch:
    """N records in C contexts each: B = N * C prompts, the contexts of a record side by side.

    Packed prompts have one context and N places for records; see `PackedBatch`.
    """

    prompts: Batch | PackedBatch
    reference: dict[str, jax.Array]
    """`sums` float32[B, S] or `log_probs` float32[B, S, T] of a reference that was computed
    before; empty where there is none."""
    fields: dict[str, jax.Array]
    """name -> float32[N, S] or [N, S, T], see `objectives.registry.FIELDS`."""
    teacher: Batch | None = None
    """The same responses in the same places, after what a teacher sees; None without one."""


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
    amounts: Amounts = dataclasses.field(default_factory=Amounts)
    """How much of the data is in it, over all processes."""


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
        _sizes(examples),
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


def batch_maker(
    examples: Sequence[Example],
    processor: Processor,
    lengths: Lengths,
    batch_size: int,
    micro_batch_size: int,
    packing: Packing | None = None,
    share: Share = WHOLE,
) -> Callable[[list[int]], HostBatch]:
    """Makes batches of the examples with given indices, at most `batch_size` of them.

    Args:
      examples: of the run.
      processor: makes the pixels.
      lengths: bucket sizes.
      batch_size, micro_batch_size: examples, over all devices.
      packing: how examples of one context are packed; None pads prompts and responses.
      share: of the rows, which this process makes.
    """
    if packing is not None:
        sizes_of_all = _sizes(examples)
        return functools.partial(_make_packed, examples, processor, packing, share, sizes_of_all)
    sizes = rows_of(examples).sizes
    num_responses, shown = int(sizes.responses.max()), bool(sizes.shows_later.any())
    pattern = examples[0]

    def make(indices: list[int]) -> HostBatch:
        chosen = [examples[int(index)] for index in indices]
        records = [record for example in chosen for record in example.rows]
        prompt = max(len(record.prompt_ids) for record in records)
        response = max(len(r.ids) for record in records for r in record.responses)
        contexts = len(examples[0].contexts)
        micro_batches, computed = [], 0
        for start in range(0, batch_size, micro_batch_size):
            numbers = range(start, start + micro_batch_size)
            own = [number if number < len(chosen) else None for number in share.of(numbers)]
            places = {
                place: chosen[number] for place, number in enumerate(own) if number is not None
            }
            nothing: tuple[None, ...] = (None,) * contexts
            prompts = pad_batch(
                [
                    context
                    for place in range(len(own))
                    for context in (places[place].contexts if place in places else nothing)
                ],
                processor,
                rows=len(own) * contexts,
                prompt_sizes=[size for size in lengths.prompt if size >= prompt][:1],
                response_sizes=[size for size in lengths.response if size >= response][:1],
                num_responses=num_responses,
                num_slots=max(record.num_slots for record in records),
                shown=shown,
            )
            size = prompts.prompt_ids.size + prompts.response_ids.size
            computed += size * micro_batch_size // len(own)
            micro_batches.append(_with_fields(prompts, places, len(own), pattern))
        return _stacked(micro_batches, chosen, computed)

    return make


def _make_packed(
    examples: Sequence[Example],
    processor: Processor,
    packing: Packing,
    share: Share,
    sizes: Sequence[Size],
    indices: list[int],
) -> HostBatch:
    """A batch of the examples with the given indices, see `batch_maker`."""
    numbers = [int(index) for index in indices]
    filled = packing.fill(numbers, sizes)
    shape = packing.shape(filled, sizes)
    made = {number: examples[number] for number in dict.fromkeys(numbers)}
    records = {number: example.rows[0] for number, example in made.items()}
    micro_batches = []
    for of_all in filled:
        groups = share.of(of_all)
        prompts = pack_batch(records, groups, processor, shape)
        places = {
            group * shape.records + place: made[number]
            for group, rows in enumerate(groups)
            for place, number in enumerate(itertools.chain.from_iterable(rows))
        }
        like = made[numbers[0]]
        micro_batches.append(_with_fields(prompts, places, len(prompts.weights), like))
    chosen = [made[number] for number in numbers]
    return _stacked(micro_batches, chosen, packing.micro_batches * shape.computed)


class _Rows(Sequence[TokenizedRecord]):
    """The main contexts of examples."""

    def __init__(self, examples: Sequence[Example]):
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, number: Any) -> Any:
        return self.examples[number].contexts[0]


def _sizes(examples: Sequence[Example]) -> list[Size]:
    """What the main contexts of examples take."""
    return sizes_of(examples.rows if isinstance(examples, Examples) else _Rows(examples))


def _with_fields(
    prompts: Batch | PackedBatch, places: Mapping[int, Example], count: int, like: Example
) -> TrainBatch:
    """A micro-batch.

    Args:
      prompts: of it.
      places: the examples by their places.
      count: places in all, N.
      like: any example of the run.
    """
    contexts, size = len(like.contexts), prompts.loss_mask.shape[1:]
    reference = {
        name: _placed(
            {place: example.reference[name] for place, example in places.items()},
            (count, contexts, *size)[: value.ndim + 1],
        ).reshape(count * contexts, *size[: value.ndim - 1])
        for name, value in like.reference.items()
    }
    fields = {
        name: _placed(
            {place: example.fields[name] for place, example in places.items()},
            (count, *size)[: value.ndim + 1],
        )
        for name, value in like.fields.items()
    }
    # NumPy here, jax.Array on the mesh, as in `pad_batch`.
    arrays: dict[str, Any] = {"reference": reference, "fields": fields}
    return TrainBatch(prompts, **arrays)


def _stacked(
    micro_batches: Sequence[TrainBatch], examples: Sequence[Example], computed: int
) -> HostBatch:
    """What a step consumes, of micro-batches of one shape, of which so many tokens are computed."""
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *micro_batches)
    ids = tuple(example.id for example in examples)
    records = [record for example in examples for record in example.rows]
    pairs = sum(preference_pairs(example.ranks) for example in examples)
    amounts = Amounts.of(records, len(examples), pairs, computed)
    return HostBatch(stacked, ids, {USEFUL_SHARE: amounts.tokens / computed}, amounts)


def _placed(values: Mapping[int, np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    """float32[shape]: the values in their places of the first axis, and zeros beyond them."""
    padded = np.zeros(shape, np.float32)
    for place, value in values.items():
        padded[place][tuple(slice(length) for length in value.shape)] = value
    return padded
