"""Records packed into rows of tokens: which stand together, and the arrays of a `PackedBatch`.

A batch is made of groups, one for every device that batches are split over, and a group of rows.
Both are filled alike: the next largest record goes to where there is least, so they end nearly
equally full.
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from mmpo_jax.data.batching import image_arrays, place_media
from mmpo_jax.data.processor import Processor
from mmpo_jax.data.tokenization import TokenizedRecord
from mmpo_jax.data.tokenized_rows import KnownRows
from mmpo_jax.models.batch import PackedBatch
from mmpo_jax.models.layout import pad_size
from mmpo_jax.models.packed_attention import packed_blocks

STEP = 32
"""What lengths are rounded up to, as far as that is little of them."""

MANY = 4
"""A record alone in its row has many responses if they take more than so many of the longest."""
CANDIDATES = 16
"""Numbers of rows that are tried, about."""
GROUPS = 64
"""Groups that the number of rows is chosen by, at most."""

GroupRows = Sequence[Sequence[int]]
"""What one device gets of a batch, by row: numbers of records."""


@dataclasses.dataclass(frozen=True)
class Size:
    """How much of a batch a record takes."""

    tokens: int
    """Tokens of the prompt and all responses."""
    targets: int
    """Tokens to predict, see `PackedBatch.target`."""
    responses: int
    longest: int
    """Tokens of the longest response."""
    slots: int
    """Rows of pixels; 0 without images."""
    prompt: int = 0
    """Tokens of the prompt."""

    @classmethod
    def of(cls, record: TokenizedRecord) -> Size:
        lengths = [len(response.ids) for response in record.responses]
        return cls(
            len(record.prompt_ids) + sum(lengths),
            sum(int(response.loss_mask.sum()) for response in record.responses),
            len(lengths),
            max(lengths, default=0),
            record.num_slots,
            len(record.prompt_ids),
        )


def sizes_of(records: Sequence[TokenizedRecord]) -> list[Size]:
    """How much of a batch each record takes; of `KnownRows`, in their only context."""
    if not isinstance(records, KnownRows):
        return [Size.of(record) for record in records]
    known = records.sizes
    columns = (
        known.tokens,
        known.targets,
        known.responses,
        known.response,
        known.slots,
        known.prompt,
    )
    return [Size(*row) for row in zip(*(column.tolist() for column in columns), strict=True)]


@dataclasses.dataclass(frozen=True)
class PackedSizes:
    """The static sizes of a `PackedBatch`, by the letters of its annotations."""

    groups: int
    """Z."""
    rows: int
    """b, of a group."""
    tokens: int
    """S, of a row."""
    targets: int
    """M, of a group."""
    records: int
    """C, of a group."""
    responses: int
    """R."""
    response: int
    """T."""
    shown: int
    """V, records with images of a group."""
    slots: int
    """I."""
    reach: int
    """Tokens of the longest record."""
    prompt: int = 0
    """See `PackedBatch.prompt`."""

    @classmethod
    def holding(cls, batches: Iterable[Sequence[GroupRows]], sizes: Sequence[Size]) -> PackedSizes:
        """The smallest sizes, rounded up, that hold each of some batches.

        Args:
          batches: of groups of rows of numbers of records.
          sizes: of the records.
        """
        held = [
            [[[sizes[i] for i in row] for row in group] for group in batch] for batch in batches
        ]
        groups = [group for batch in held for group in batch]
        rows = [row for group in groups for row in group]
        found = [size for row in rows for size in row]
        in_group = [[size for row in group for size in row] for group in groups]
        prompt = rounded(_most(size.prompt for size in found))
        response = rounded(_most(size.longest for size in found))
        alone = _most(map(len, rows)) == 1
        many = _most(size.tokens for size in found) > prompt + MANY * response
        return cls(
            groups=max(map(len, held)),
            rows=_most(map(len, groups)),
            tokens=rounded(_most(sum(size.tokens for size in row) for row in rows)),
            targets=rounded(_most(sum(size.targets for size in group) for group in in_group)),
            records=pad_size(_most(map(len, in_group))),
            responses=pad_size(_most(size.responses for size in found)),
            response=response,
            shown=max(1, _most(sum(size.slots > 0 for size in group) for group in in_group)),
            slots=pad_size(_most(size.slots for size in found)),
            reach=rounded(_most(size.tokens for size in found)),
            prompt=prompt if alone and many else 0,
        )

    @property
    def computed(self) -> int:
        """Tokens that the decoder computes of a batch."""
        return self.groups * self.rows * self.tokens

    def cost(self, width: int) -> float:
        """What computing a batch takes, in tokens through the dense layers.

        A layer takes some 24 D^2 operations a token, and 4 D for every key that a query is held
        against.

        Args:
          width: D.
        """
        keys, length = 0, self.tokens
        for queries, seen in packed_blocks(length, self.reach, self.prompt, self.response):
            keys += (queries.stop - queries.start) * sum(part.stop - part.start for part in seen)
        return self.groups * self.rows * (length + keys / (6 * width))


def rounded(length: int) -> int:
    """A length rounded up, by a sixteenth of it at most where it is long."""
    step = STEP
    while step * 32 <= length:
        step *= 2
    return max(step, -(-length // step) * step)


def spread(sizes: Sequence[int], bins: int, most: int | None = None) -> list[list[int]]:
    """Places of the sizes in bins of nearly the same sum, in ascending order in each.

    Args:
      sizes: of the items.
      bins: how many.
      most: items of a bin; None for any number.
    """
    filled: list[list[int]] = [[] for _ in range(bins)]
    heap = [(0, number) for number in range(bins)]
    for place in sorted(range(len(sizes)), key=lambda place: -sizes[place]):
        load, number = heapq.heappop(heap)
        filled[number].append(place)
        if most is None or len(filled[number]) < most:
            heapq.heappush(heap, (load + sizes[place], number))
    return [sorted(places) for places in filled]


def in_rows(group: Sequence[int], sizes: Sequence[Size], rows: int) -> GroupRows:
    """A group's records in so many rows."""
    places = spread([sizes[number].tokens for number in group], rows)
    return [[group[place] for place in row] for row in places]


def best_rows(
    groups: Iterable[Sequence[int]], sizes: Sequence[Size], width: int, others: bool = False
) -> int:
    """In how many rows the records of groups cost least to compute; of the first `GROUPS`.

    Few long rows are full to the end, but a query is held against more keys than it sees.

    Args:
      groups: numbers of records.
      sizes: of the records.
      width: D, of the decoder.
      others: whether other groups get the same shape, of which is not known how rows are filled.
    """
    some = list(itertools.islice(filter(None, groups), GROUPS))

    def cost(rows: int) -> float:
        filled = [[in_rows(group, sizes, rows)] for group in some]
        shape = PackedSizes.holding(filled, sizes)
        return (dataclasses.replace(shape, prompt=0) if others else shape).cost(width)

    longest = max(sizes[number].tokens for group in some for number in group)
    load = max(sum(sizes[number].tokens for number in group) for group in some)
    fewest, most = max(1, load // (4 * longest)), max(1, 2 * load // longest)
    step = max(1, (most - fewest) // CANDIDATES)
    return min({*range(fewest, most + 1, step), max(map(len, some))}, key=cost)


def _most(counts: Iterable[int]) -> int:
    return max(counts, default=0)


def pack_batch(
    records: Sequence[TokenizedRecord] | Mapping[int, TokenizedRecord],
    groups: Sequence[GroupRows],
    processor: Processor,
    sizes: PackedSizes,
) -> PackedBatch:
    """The arrays of a batch, in NumPy.

    Args:
      records: of which some stand in it, by number.
      groups: their numbers, Z times.
      processor: makes the pixels.
      sizes: hold every group.

    Raises:
      DataError: an image cannot be read.
    """
    made = [
        _pack_group([[records[i] for i in row] for row in group], processor, sizes)
        for group in groups
    ]
    arrays = jax.tree.map(lambda *leaves: np.concatenate(leaves), *made)
    return PackedBatch(**arrays, reach=sizes.reach, prompt=sizes.prompt)


def _pack_group(
    group: Sequence[Sequence[TokenizedRecord]], processor: Processor, sizes: PackedSizes
) -> Mapping[str, Any]:
    """The arrays of `PackedBatch` for one group, with their leading axis."""
    images, axes = processor.images, processor.config.decoder.position_axes
    width = images.vectors if images else 1
    shape = sizes.rows, sizes.tokens
    tokens = {
        "token_ids": np.full(shape, processor.pad_id, np.int32),
        "record": np.full(shape, -1, np.int32),
        "response": np.zeros(shape, np.int32),
        "place": np.zeros(shape, np.int32),
        "feature_row": np.zeros(shape, np.int32),
        "feature_index": np.full((*shape, width), -1, np.int32),
        "feature_weight": np.zeros((*shape, width), np.float32),
    }
    positions = np.zeros((sizes.rows, axes, sizes.tokens), np.int32)
    of_records = sizes.records, sizes.responses
    loss_mask = np.zeros((*of_records, sizes.response), bool)
    last = np.zeros(of_records, np.int32)
    targets = _Targets(sizes)
    shown: list[TokenizedRecord] = []
    number = 0
    for row, records in enumerate(group):
        cursor = 0
        for column, record in enumerate(records):
            start, prompt = cursor, len(record.prompt_ids)
            for piece in _pieces(record, processor):
                to = slice(cursor, cursor + len(piece.ids))
                tokens["token_ids"][row, to] = piece.ids
                tokens["record"][row, to] = column
                tokens["response"][row, to] = piece.response
                tokens["place"][row, to] = piece.first + np.arange(len(piece.ids))
                tokens["feature_row"][row, to] = len(shown)
                tokens["feature_index"][row, to] = piece.index
                tokens["feature_weight"][row, to] = piece.weight
                positions[row, :, to] = piece.positions
                cursor = to.stop
                if piece.response:
                    of = number, piece.response - 1
                    mask = record.responses[of[1]].loss_mask
                    loss_mask[(*of, slice(len(mask)))] = mask
                    end = (to.stop if len(mask) else start + prompt) - 1
                    last[of] = row * sizes.tokens + end
                    before = np.arange(to.start - 1, to.stop - 1)
                    before[:1] = start + prompt - 1
                    targets.add(of, row * sizes.tokens + before, piece.ids, mask)
            if record.num_slots:
                shown.append(record)
            number += 1
    filler: list[TokenizedRecord | None] = [None] * (sizes.shown - len(shown))
    return {
        **tokens,
        "positions": positions,
        **image_arrays([*shown, *filler], processor, sizes.slots),
        **targets.arrays(),
        "last": last,
        "loss_mask": loss_mask,
        "weights": (np.arange(sizes.records) < number).astype(np.float32),
    }


@dataclasses.dataclass(frozen=True)
class _Piece:
    """A prompt, or a response to it, as it stands in a row; n tokens."""

    ids: np.ndarray
    """int32[n]."""
    response: int
    """0 for the prompt, 1 + r for the response r."""
    first: int
    """Tokens before it that it sees."""
    positions: np.ndarray
    """int32[A, n]."""
    index: np.ndarray
    """int32[n, K]."""
    weight: np.ndarray
    """float32[n, K]."""


def _pieces(record: TokenizedRecord, processor: Processor) -> list[_Piece]:
    """The prompt and the responses of a record."""
    prompt = len(record.prompt_ids)
    placed = place_media(record.prompt_ids, record, processor)
    pieces = [_Piece(record.prompt_ids, 0, 0, placed.positions, placed.index, placed.weight)]
    width, axes = placed.index.shape[1], len(placed.positions)
    for number, response in enumerate(record.responses, start=1):
        count = len(response.ids)
        if record.shows_later:
            whole = place_media(
                np.concatenate([record.prompt_ids, response.ids]), record, processor
            )
            positions = whole.positions[:, prompt:]
            index, weight = whole.index[prompt:], whole.weight[prompt:]
        else:
            steps = placed.next_position + np.arange(count, dtype=np.int32)
            positions = np.broadcast_to(steps, (axes, count))
            index = np.full((count, width), -1, np.int32)
            weight = np.zeros((count, width), np.float32)
        pieces.append(_Piece(response.ids, number, prompt, positions, index, weight))
    return pieces


class _Targets:
    """The tokens to predict of a group, as they are added."""

    def __init__(self, sizes: PackedSizes):
        self.sizes = sizes
        self.shape = sizes.records, sizes.responses, sizes.response
        self.found: list[tuple[np.ndarray, ...]] = []

    def add(
        self, of: tuple[int, int], before: np.ndarray, ids: np.ndarray, mask: np.ndarray
    ) -> None:
        """Adds the tokens of a response that a loss counts.

        Args:
          of: (record, response).
          before: where in the group's tokens those stand that predict them.
          ids: of the response.
          mask: see `PackedBatch.loss_mask`.
        """
        place = np.ravel_multi_index((*of, 0), self.shape) + np.arange(len(ids))
        self.found.append((before[mask], ids[mask], place[mask]))

    def arrays(self) -> dict[str, np.ndarray]:
        """Arrays of `PackedBatch`, with a leading axis of one group."""
        names, padding = ("predictor", "target", "target_place"), (0, 0, np.prod(self.shape))
        columns = list(zip(*self.found, strict=True)) or [()] * len(names)
        return {
            name: _padded(column, self.sizes.targets, value)[None]
            for name, column, value in zip(names, columns, padding, strict=True)
        }


def _padded(parts: Sequence[np.ndarray], size: int, value: Any) -> np.ndarray:
    """int32[size]: the parts one after another, and the value behind them."""
    array = np.full(size, value, np.int32)
    if parts:
        joined = np.concatenate(parts)
        array[: len(joined)] = joined
    return array
