"""How images and videos become prompt tokens: computed on the host, read on the device.

A family's vision half turns the media of a prompt into one pool of feature vectors, its *slots*
(tiles or groups of patches) one after another. Everything that families do to a picture after
that, such as putting tiles next to each other, cutting off padding, ending lines with a learned
vector or shrinking bilinearly, is a weighted choice of vectors from the pool. It is worked out
here in NumPy, and the device only gathers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int


@dataclasses.dataclass(frozen=True)
class Layout:
    """One image or video of a prompt; n tokens of which m take a feature, K vectors each."""

    ids: np.ndarray
    """int32[n]: the placeholder token for every feature, and what frames them."""
    index: np.ndarray
    """int32[m, K]: indices into this medium's own features; -1 - e for the e-th of the vectors
    that the model has learned beside them (a newline)."""
    weight: np.ndarray
    """float32[m, K]: weights of these features."""
    slots: int
    """How many rows of `pixel_values` the medium takes."""
    features: int
    """How many vectors the vision half makes of them."""
    steps: np.ndarray | None = None
    """int32[3, m]: time, row and column of every feature, for decoders with several position
    axes."""
    span: int = 0
    """Number of positions that the text moves on by over the medium, where `steps` are given; over
    each run of its features, where there is text between."""
    times: tuple[float, ...] = ()
    """Seconds from the beginning at which a video's time steps are, where tokens say so."""

    @classmethod
    def plain(cls, token: int, count: int, slots: int = 1) -> Layout:
        """`count` features in their own order."""
        index = np.arange(count, dtype=np.int32)[:, None]
        ids = np.full(count, token, np.int32)
        return cls(ids, index, np.ones((count, 1), np.float32), slots, count)


@dataclasses.dataclass(frozen=True)
class Placement:
    """What one prompt's tokens read and where they stand, as in `Batch`."""

    index: np.ndarray
    """int32[p, K]: features that every token mixes; -1 at text."""
    weight: np.ndarray
    """float32[p, K]: their weights."""
    positions: np.ndarray
    """int32[A, p]: positions on every axis."""
    next_position: int
    """Position of the first token of a response."""


def place(
    prompt_ids: Int[np.ndarray, " p"],
    layouts: Sequence[Layout],
    placeholders: Sequence[int],
    *,
    extras: int = 0,
    width: int = 1,
    axes: int = 1,
) -> Placement:
    """The features that a prompt's tokens mix, and their positions.

    Args:
      prompt_ids: int32[p], media expanded to their layouts' ids.
      layouts: the media in order; those behind the prompt's end are not read.
      placeholders: ids of the tokens that take features.
      extras: how many learned vectors lie before the pool's features.
      width: K, vectors per token.
      axes: A, position axes of the decoder.

    Raises:
      ValueError: the prompt's placeholders are not those of the first of the layouts.
    """
    at = np.flatnonzero(np.isin(prompt_ids, placeholders))
    layouts = layouts[: media_in(len(at), layouts)]
    index = np.full((len(prompt_ids), width), -1, np.int32)
    weight = np.zeros((len(prompt_ids), width), np.float32)
    done, offset = 0, extras
    for layout in layouts:
        own = at[done : done + len(layout.index)]
        columns = layout.index.shape[1]
        index[own] = 0
        index[own, :columns] = np.where(layout.index < 0, -1 - layout.index, layout.index + offset)
        weight[own, :columns] = layout.weight
        done += len(own)
        offset += layout.features
    positions, following = _positions(len(prompt_ids), layouts, at, axes)
    return Placement(index, weight, positions, following)


def media_in(places: int, layouts: Sequence[Layout]) -> int:
    """How many of the layouts, from the first on, have so many places for features together.

    Raises:
      ValueError: no number of them has.
    """
    ends = np.cumsum([0, *(len(layout.index) for layout in layouts)])
    count = int(np.searchsorted(ends, places))
    if count == len(ends) or ends[count] != places:
        raise ValueError(f"{places} places for {ends[-1]} image features")
    return count


def _positions(
    length: int, layouts: Sequence[Layout], at: Int[np.ndarray, " m"], axes: int
) -> tuple[Int[np.ndarray, "A p"], int]:
    """int32[A, length], and the position after them.

    With several axes, a medium's tokens stand at their own time, row and column behind the text
    before them, and the text after goes on behind its span (Qwen2-VL, section 2.1). Where text
    stands between the frames of a video, each is a medium of its own in this.
    """
    if axes == 1:
        return np.arange(length, dtype=np.int32)[None], length
    positions = np.zeros((axes, length), np.int32)
    done = token = following = 0
    for layout in layouts:
        own = at[done : done + len(layout.index)]
        assert layout.steps is not None
        breaks = np.flatnonzero(np.diff(own) > 1) + 1
        parts = np.split(own, breaks), np.split(layout.steps, breaks, axis=1)
        for run, steps in zip(*parts, strict=True):
            text = run[0] - token
            positions[:, token : run[0]] = following + np.arange(text)
            following += text
            positions[:, run] = following + steps
            following += layout.span
            token = run[-1] + 1
        done += len(own)
    positions[:, token:] = following + np.arange(length - token)
    return positions, int(positions.max()) + 1


def pad_size(count: int) -> int:
    """The static size for `count` slots: the next of m * 2^k with m in 4..7, at most a quarter
    more, so that few programs are compiled."""
    step = 1
    while count > 7 * step:
        step *= 2
    return -(-count // step) * step
