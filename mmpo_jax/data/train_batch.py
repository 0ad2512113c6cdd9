"""What a step of training consumes, made of examples: padded or packed, with their fields."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from mmpo_jax.data.amounts import Amounts, preference_pairs
from mmpo_jax.data.batching import pad_batch
from mmpo_jax.data.examples import Example, rows_of, sizes_of_examples
from mmpo_jax.data.lengths import Lengths
from mmpo_jax.data.packed_batches import Packing
from mmpo_jax.data.packing import Size, pack_batch
from mmpo_jax.data.processor import Processor
from mmpo_jax.models.batch import Batch, PackedBatch
from mmpo_jax.parallel.mesh import WHOLE, Share

USEFUL_SHARE = "useful_tokens"
"""The metric that says which share of the tokens of a batch is no padding."""


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
class HostBatch:
    """What one step consumes on this process."""

    arrays: TrainBatch
    """NumPy, micro-batches stacked on the leading axis."""
    ids: tuple[str, ...]
    """Ids of all rows of the global batch."""
    metrics: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """What is to be reported of it beside what the loss reports."""
    amounts: Amounts = dataclasses.field(default_factory=Amounts)
    """How much of the data is in it, over all processes."""
    taught: Amounts = dataclasses.field(default_factory=Amounts)
    """How much a teacher is shown of it."""


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
        sizes_of_all = sizes_of_examples(examples)
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
