"""Which records are computed together: full batches of a few static shapes."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import logging
import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from mmpo_jax.checkpoints.checkpoint import Checkpoint
from mmpo_jax.data.batching import bucket, fitting_sizes, pad_batch
from mmpo_jax.data.lengths import Lengths
from mmpo_jax.data.packing import (
    GroupRows,
    PackedSizes,
    Size,
    best_rows,
    in_rows,
    pack_batch,
    sizes_of,
    spread,
)
from mmpo_jax.data.processor import Processor
from mmpo_jax.data.tokenization import TokenizedRecord
from mmpo_jax.data.tokenized_rows import known
from mmpo_jax.models.attention import is_packed
from mmpo_jax.models.batch import Batch
from mmpo_jax.models.layout import pad_size
from mmpo_jax.models.model import Model
from mmpo_jax.parallel.mesh import WHOLE, Share, batch_shards

log = logging.getLogger(__name__)

SHORTEST = 256
"""Up to so many tokens, records are of one class whatever their lengths."""
FEWEST = 4
"""Batches for which a shape of their own is worth compiling."""


@dataclasses.dataclass(frozen=True)
class PlannedBatch:
    """A batch that will be made when its turn comes."""

    make: Callable[..., Any]
    """Function of a `Share` that gives the arrays of those of its rows, in NumPy; of all by
    default."""
    places: tuple[tuple[int, int], ...]
    """(number of a record, where on the leading axis of what is computed it stands)."""
    tokens: int
    """Tokens of the records."""
    computed: int
    """Tokens that are computed, padding included."""

    def renumbered(self, numbers: Sequence[int]) -> PlannedBatch:
        """The batch, where its record n is the record `numbers[n]` of the whole."""
        places = tuple((numbers[number], place) for number, place in self.places)
        return dataclasses.replace(self, places=places)


def in_classes(
    classes: Sequence[Hashable], sizes: Sequence[int], capacity: float, fewest: int = 1
) -> dict[Any, list[int]]:
    """The items of every class, in ascending order of the classes, as whole batches of it.

    What would only begin another batch of its class goes along with the next class, the largest
    items first, and all of a class that has but few.

    Args:
      classes: of every item; comparable.
      sizes: of every item.
      capacity: of a batch, in what sizes count.
      fewest: batches that a class of its own has.

    Returns:
      class -> numbers of items; only the last one's need not fill whole batches.
    """
    known: list[Any] = sorted(set(classes))
    own: dict[Any, list[int]] = {name: [] for name in known}
    for number, name in enumerate(classes):
        own[name].append(number)
    filled: dict[Any, list[int]] = {}
    carried: list[int] = []
    for name in known:
        items = sorted([*carried, *own[name]], key=lambda number: sizes[number])
        if name != known[-1]:
            total = sum(sizes[number] for number in items)
            full = int(total // capacity)
            room = full * capacity if full >= fewest else 0
            sums = itertools.accumulate(sizes[number] for number in items)
            count = sum(load <= room for load in sums)
            items, carried = items[:count], items[count:]
        if items:
            filled[name] = sorted(items)
    return filled


def plan_responses(
    checkpoint: Checkpoint,
    records: Sequence[TokenizedRecord],
    lengths: Lengths,
    mesh: Mesh,
    batch_size: int,
    part_size: int | None = None,
    usual_responses: int | None = None,
) -> list[list[PlannedBatch]]:
    """Batches of prompts with their responses, for every part of the records by itself.

    They are packed where plain JAX computes attention. Kernels get one prompt a row, records of the
    same bucket sizes together.

    Args:
      checkpoint: that they are for.
      records: with responses.
      lengths: bucket sizes, where batches are not packed.
      mesh: the devices.
      batch_size: records at a time; of packed batches in the mean.
      part_size: records of a part; None for one part.
      usual_responses: where numbers of responses differ, how many a record has that `batch_size`
        counts as one: batches of records with more have fewer, so that they have no more tokens,
        and kernels get few numbers of responses. None where records of a batch have to have as
        many, and `batch_size` counts all alike.

    Returns:
      The batches of every part; numbers of records are those in the whole.
    """
    shards, processor = batch_shards(mesh), checkpoint.processor
    part_size = part_size or max(1, len(records))
    rows = -(-batch_size // shards) * shards
    if packed_over(checkpoint.model, mesh) is not None:
        return plan_packed(records, processor, shards, rows, part_size, usual_responses)
    parts = []
    for start in range(0, len(records), part_size):
        part = records[start : start + part_size]
        if usual_responses is None:
            batches = plan_padded(part, processor, lengths, rows=rows)
        else:
            batches = plan_many_responses(
                part, processor, lengths, shards=shards, rows=rows, usual=usual_responses
            )
        parts.append([batch.renumbered(range(start, start + len(part))) for batch in batches])
    return parts


def packed_over(model: Model, mesh: Mesh) -> int | None:
    """Over how many devices batches of a model are packed; None where they are padded, as they are
    where layers have states: those are forked where a row's one prompt ends."""
    if model.config.decoder.delta_nets:
        _say_padded()
        return None
    with jax.set_mesh(mesh):
        packed = is_packed(model.attention, model.config.decoder.in_kernels)
    return batch_shards(mesh) if packed else None


@functools.cache
def _say_padded() -> None:
    log.info("rows are padded and not packed: the model's delta nets have a state per response")


def plan_packed(
    records: Sequence[TokenizedRecord],
    processor: Processor,
    shards: int,
    batch_size: int,
    part_size: int,
    usual_responses: int | None = None,
) -> list[list[PlannedBatch]]:
    """`plan_responses` packed.

    Records that are of a kind in length and in images stand together. All batches of a kind have
    one shape, over all parts, so that it is compiled once.

    Args:
      records: with responses.
      processor: of the checkpoint.
      shards: devices that batches are split over.
      batch_size: records of a batch in the mean.
      part_size: records of a part.
      usual_responses: see `plan_responses`; `batch_size` is that of records which have no more.
    """
    sizes = sizes_of(records)
    tokens = sum(size.tokens for size in sizes)
    if usual_responses is not None:
        tokens = sum(_usual_tokens(record, usual_responses) for record in records)
    budget = tokens * batch_size / max(1, len(sizes))
    starts = range(0, len(records), part_size)
    plans: list[list[PlannedBatch]] = [[] for _ in starts]
    cut: dict[Any, list[tuple[int, list[list[int]]]]] = {}
    for number, start in enumerate(starts):
        part = range(start, min(start + part_size, len(records)))
        for kind, batches in _cut(part, sizes, budget, batch_size, shards).items():
            cut.setdefault(kind, []).extend((number, batch) for batch in batches)
    for kind in sorted(cut):
        groups = (group for _, batch in cut[kind] for group in batch)
        rows = best_rows(groups, sizes, processor.config.decoder.hidden_size)
        filled = [
            (number, [in_rows(group, sizes, rows) for group in batch])
            for number, batch in cut[kind]
        ]
        shape = PackedSizes.holding([batch for _, batch in filled], sizes)
        for number, batch in filled:
            plans[number].append(_packed(records, sizes, batch, processor, shape))
    return plans


def _usual_tokens(record: TokenizedRecord, responses: int) -> int:
    """Tokens of a record's prompt and of so many of its responses, at most."""
    lengths = [len(response.ids) for response in record.responses]
    share = min(1, responses / max(1, len(lengths)))
    return len(record.prompt_ids) + math.ceil(sum(lengths) * share)


def _cut(
    part: range, sizes: Sequence[Size], budget: float, batch_size: int, shards: int
) -> dict[Any, list[list[list[int]]]]:
    """(slots, tokens) -> batches of groups of the numbers of a part's records.

    Only records that take as many slots go along with each other: pixels are padded too. Of records
    with images no batch has more than `batch_size`, however short they are.
    """
    by_slots: dict[int, list[int]] = {}
    for number in part:
        by_slots.setdefault(pad_size(sizes[number].slots), []).append(number)
    batches: dict[Any, list[list[list[int]]]] = {}
    for slots, numbers in by_slots.items():
        tokens = [sizes[number].tokens for number in numbers]
        classes = [max(SHORTEST, 1 << (count - 1).bit_length()) for count in tokens]
        for name, places in in_classes(classes, tokens, budget, FEWEST).items():
            load = [tokens[place] for place in places]
            count = max(1, math.ceil(sum(load) / budget - 0.1))
            if slots:
                count = max(count, math.ceil(len(places) / batch_size))
            groups = [
                [numbers[places[place]] for place in group]
                for group in spread(load, count * shards)
            ]
            batches[slots, name] = [
                groups[start : start + shards] for start in range(0, len(groups), shards)
            ]
    return batches


def _packed(
    records: Sequence[TokenizedRecord],
    sizes: Sequence[Size],
    groups: Sequence[GroupRows],
    processor: Processor,
    shape: PackedSizes,
) -> PlannedBatch:
    places = [
        (number, place * shape.records + column)
        for place, group in enumerate(groups)
        for column, number in enumerate(itertools.chain.from_iterable(group))
    ]

    def make(share: Share = WHOLE) -> Any:
        return pack_batch(records, share.of(groups), processor, shape)

    tokens = sum(sizes[number].tokens for number, _ in places)
    return PlannedBatch(make, tuple(places), tokens, shape.computed)


def plan_padded(
    records: Sequence[TokenizedRecord],
    processor: Processor,
    lengths: Lengths,
    *,
    rows: int,
    with_responses: bool = True,
    num_responses: int | None = None,
) -> list[PlannedBatch]:
    """Batches of prompts and responses padded to bucket sizes, those of a kind together.

    Args:
      records: tokenized.
      processor: of the checkpoint.
      lengths: bucket sizes.
      rows: B.
      with_responses: whether responses stand in the batch, or prompts alone.
      num_responses: R, where records may have fewer; None where those of a batch have as many.
    """

    sizes = known(records).sizes
    # Those of a kind but for the prompt go along with each other.
    kinds: dict[tuple[int, int, int], list[int]] = {}
    for number in range(len(records)):
        own = int(sizes.responses[number]) if num_responses is None else num_responses
        responses = own if with_responses else 0
        response = bucket(int(sizes.response[number]), lengths.response) if responses else 0
        kind = pad_size(int(sizes.slots[number])), responses, response
        kinds.setdefault(kind, []).append(number)
    batches = []
    for kind, members in sorted(kinds.items()):
        prompts = [bucket(int(sizes.prompt[number]), lengths.prompt) for number in members]
        for prompt, places in in_classes(prompts, [1] * len(prompts), rows).items():
            numbers = [members[place] for place in places]
            for start in range(0, len(numbers), rows):
                chosen = numbers[start : start + rows]
                counted = sizes.tokens if with_responses else sizes.prompt
                batches.append(
                    PlannedBatch(
                        _padded(
                            records,
                            chosen,
                            processor,
                            rows,
                            (prompt, *kind),
                            bool(sizes.shows_later[chosen].any()),
                        ),
                        tuple((number, row) for row, number in enumerate(chosen)),
                        int(counted[chosen].sum()),
                        rows * (prompt + kind[1] * kind[2]),
                    )
                )
    return batches


def plan_many_responses(
    records: Sequence[TokenizedRecord],
    processor: Processor,
    lengths: Lengths,
    *,
    shards: int,
    rows: int,
    usual: int,
) -> list[PlannedBatch]:
    """Padded batches of records that differ much in their number of responses.

    The number is padded to a few sizes, as every shape is a program of its own, and records of a
    size that fill few batches go along with the next larger.

    Args:
      records: tokenized, with responses.
      processor: of the checkpoint.
      lengths: bucket sizes.
      shards: devices that batches are split over.
      rows: B, of records with `usual` responses or fewer; a multiple of `shards`.
      usual: see `plan_responses`.
    """
    sizes = known(records).sizes
    counts = [int(count) for count in sizes.responses]
    steps = fitting_sizes(counts, 2)
    classes = [bucket(count, steps) for count in counts]
    batches: list[PlannedBatch] = []
    for count, numbers in in_classes(classes, [1] * len(classes), rows, FEWEST).items():
        members = [records[number] for number in numbers]
        prompt = bucket(int(sizes.prompt[numbers].max()), lengths.prompt)
        response = bucket(int(sizes.response[numbers].max()), lengths.response)
        budget = rows * (prompt + min(count, usual) * response)
        fitting = budget // (prompt + count * response) // shards * shards
        planned = plan_padded(
            members,
            processor,
            lengths,
            rows=max(shards, fitting),
            num_responses=count,
        )
        batches += [batch.renumbered(numbers) for batch in planned]
    return batches


def _padded(
    records: Sequence[TokenizedRecord],
    numbers: Sequence[int],
    processor: Processor,
    rows: int,
    shape: tuple[int, int, int, int],
    shown: bool,
) -> Callable[..., Batch]:
    """Makes rows of a batch of (P, I, R, T), in which responses may show images."""
    prompt, slots, responses, response = shape

    def make(share: Share = WHOLE) -> Batch:
        places: list[int | None] = [*numbers, *[None] * (rows - len(numbers))]
        own = share.of(places)
        chosen = [None if number is None else records[number] for number in own]
        if not responses:
            chosen = [record and dataclasses.replace(record, responses=()) for record in chosen]
        return pad_batch(
            chosen,
            processor,
            rows=len(own),
            prompt_sizes=(prompt,),
            response_sizes=(response,),
            num_responses=responses,
            num_slots=slots,
            shown=shown,
        )

    return make
