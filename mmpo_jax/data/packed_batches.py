"""How the batches of a training run are packed: what stands in which micro-batch, and a few shapes.

A result does not depend on how a batch is cut, so records go where there is room.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
from collections.abc import Iterable, Mapping, Sequence

from mmpo_jax.data.packing import (
    GroupRows,
    PackedSizes,
    Size,
    best_rows,
    in_rows,
    rounded,
    spread,
)

MOST_SHAPES = 3
"""Shapes of a run, at most; each is compiled."""
ENOUGH = 0.85
"""Useful share of tokens for which no further shape is compiled."""
LOOKED_AT = 2048
"""Batches that shapes are chosen by, at most."""


@dataclasses.dataclass(frozen=True)
class Packing:
    """How the batches of a run are packed."""

    micro_batches: int
    """Micro-batches of a batch."""
    groups: int
    """Z, groups of a micro-batch."""
    records: int
    """C, records of a group at most."""
    rows: int
    """b, rows of a group."""
    shapes: tuple[PackedSizes, ...] = ()
    """Sizes in ascending order; the first that holds a batch is taken."""

    def fill(self, numbers: Sequence[int], sizes: Sequence[Size]) -> list[list[GroupRows]]:
        """The groups of every micro-batch.

        Args:
          numbers: of the records in a batch.
          sizes: of all records.
        """
        tokens = [sizes[number].tokens for number in numbers]
        groups = [
            in_rows([numbers[place] for place in group], sizes, self.rows)
            for group in spread(tokens, self.micro_batches * self.groups, self.records)
        ]
        return [groups[i : i + self.groups] for i in range(0, len(groups), self.groups)]

    def shape(self, filled: Sequence[Sequence[GroupRows]], sizes: Sequence[Size]) -> PackedSizes:
        """The sizes that the micro-batches of a batch are made in."""
        needed = PackedSizes.holding(filled, sizes)
        slots = needed.slots
        for shape in self.shapes:
            if shape.tokens >= needed.tokens and shape.targets >= needed.targets:
                return dataclasses.replace(shape, slots=slots)
        largest = self.shapes[-1]
        return dataclasses.replace(
            largest,
            tokens=_widened(largest.tokens, needed.tokens),
            targets=_widened(largest.targets, needed.targets),
            slots=slots,
        )


def _widened(length: int, needed: int) -> int:
    """A length that holds what is needed, in steps so large that few are ever compiled."""
    while length < needed:
        length = rounded(length * 5 // 4)
    return length


def plan_packing(
    batches: Sequence[Sequence[int]],
    sizes: Sequence[Size],
    *,
    batch_size: int,
    micro_batch_size: int,
    shards: int,
    width: int,
) -> Packing:
    """Packing for the batches of a run.

    Args:
      batches: numbers of records.
      sizes: of all records.
      batch_size, micro_batch_size: records, over all devices.
      shards: devices that batches are split over.
      width: D, of the decoder.
    """
    packing = Packing(batch_size // micro_batch_size, shards, micro_batch_size // shards, 1)
    step = -(-len(batches) // LOOKED_AT)
    looked_at = [batches[place] for place in range(0, len(batches), step)]
    groups = (
        list(itertools.chain.from_iterable(group))
        for batch in looked_at
        for micro in packing.fill(batch, sizes)
        for group in micro
    )
    rows = best_rows(groups, sizes, width, others=True)
    packing = dataclasses.replace(packing, rows=rows)
    found = [PackedSizes.holding(packing.fill(batch, sizes), sizes) for batch in looked_at]
    needed = collections.Counter((shape.tokens, shape.targets) for shape in found)
    tokens = sum(sum(sizes[number].tokens for number in batch) for batch in looked_at)
    most = tokens / (ENOUGH * packing.micro_batches * shards * rows)
    cuts = [_best_cut(needed, count) for count in range(1, MOST_SHAPES + 1)]
    enough = (cut for cut in cuts if _padded_tokens(needed, cut) <= most)
    chosen = next(enough, cuts[-1])
    shapes = tuple(
        PackedSizes(
            groups=shards,
            rows=rows,
            tokens=of_row,
            targets=of_group,
            records=packing.records,
            responses=max(size.responses for size in sizes),
            response=rounded(max(size.longest for size in sizes)),
            shown=packing.records if any(size.slots for size in sizes) else 1,
            slots=0,  # each batch has its own
            reach=rounded(max(size.tokens for size in sizes)),
        )
        for of_row, of_group in chosen
    )
    return dataclasses.replace(packing, shapes=shapes)


Bounds = list[tuple[int, int]]
"""(tokens of a row, targets of a group), in ascending order."""


def _best_cut(needed: Mapping[tuple[int, int], int], count: int) -> Bounds:
    """At most so many bounds that hold all batches with the fewest tokens of padding.

    Args:
      needed: (tokens, targets) -> of how many batches.
      count: of the bounds.
    """
    tokens = sorted({tokens for tokens, _ in needed})
    cuts = itertools.combinations(tokens[:-1], min(count, len(tokens)) - 1)
    bounds = (_bounds(needed, [*cut, tokens[-1]]) for cut in cuts)
    return min(bounds, key=functools.partial(_padded_tokens, needed))


def _bounds(needed: Iterable[tuple[int, int]], tokens: Sequence[int]) -> Bounds:
    """The bounds of so many tokens; a later one has no fewer targets."""
    bounds: Bounds = []
    before, targets = 0, 0
    for bound in tokens:
        targets = max([targets, *(m for s, m in needed if before < s <= bound)])
        bounds.append((bound, targets))
        before = bound
    return bounds


def _padded_tokens(needed: Mapping[tuple[int, int], int], bounds: Bounds) -> int:
    """Tokens of a row in every batch, each as long as the first bound that holds it."""
    return sum(
        count * next(bound for bound, _ in bounds if bound >= tokens)
        for (tokens, _), count in needed.items()
    )
