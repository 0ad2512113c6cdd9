"""Images of any resolution as tiles: where prompt tokens find their features.

An image that is cut into tiles takes one slot for a small copy of the whole, then one per tile.
The tiles' features are put together to one picture again, what only pads the image is cut off,
and a learned vector ends each line (LLaVA-NeXT); LLaVA-OneVision shrinks large pictures first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from mmpo_jax.models.config import ModelError
from mmpo_jax.models.layout import Layout

Mix = tuple[np.ndarray, np.ndarray]
"""(indices of features, their weights), each [..., k] for tokens of k vectors; as in `Layout`."""

NEWLINE: Mix = np.full((1, 1), -1), np.ones((1, 1))
"""Mix of one token: the learned vector that ends a line."""


def tile_grid(processor: Any, size: tuple[int, int], tile: int) -> tuple[int, int]:
    """(rows, columns) of the tiles that an image processor cuts an image into.

    Of its resolutions it takes the one that keeps most of the image's own pixels when the image
    is scaled to fit, and of those the smallest (LLaVA-NeXT).

    Args:
      processor: a transformers image processor with `image_grid_pinpoints`.
      size: (height, width) of the image.
      tile: edge of a tile in pixels.

    Raises:
      ModelError: tiles do not fill the resolution.
    """
    height, width = size

    def fit(resolution: Sequence[int]) -> tuple[int, int]:
        scale = min(resolution[1] / width, resolution[0] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, -resolution[0] * resolution[1]

    best = max(processor.image_grid_pinpoints, key=fit)
    if best[0] % tile or best[1] % tile:
        raise ModelError(
            f"image_grid_pinpoints of the image processor has {list(best)}, which is no multiple "
            f"of the vision tower's image_size {tile}"
        )
    return best[0] // tile, best[1] // tile


def tiled(
    token: int,
    size: tuple[int, int],
    grid: tuple[int, int],
    side: int,
    max_tiles: int | None = None,
) -> Layout:
    """An image as a small copy of the whole, then its tiles as one picture in lines.

    Args:
      token: the placeholder.
      size: (height, width) of the image in pixels.
      grid: rows and columns of tiles.
      side: features along the edge of a tile.
      max_tiles: a picture of more features than so many tiles have is shrunk to about that.
    """
    rows, columns = grid
    tiles = side**2 + np.arange(rows * columns * side**2).reshape(rows, columns, side, side)
    places = _unpad(tiles.swapaxes(1, 2).reshape(rows * side, columns * side), size)
    picture = _plain(places)
    if max_tiles is not None:
        ratio = math.sqrt(places.size / (max_tiles * side**2))
        if ratio > 1.1:
            picture = _shrink(places, *(int(edge // ratio) for edge in places.shape))
    lines = [part for line in zip(*picture, strict=True) for part in (line, NEWLINE)]
    return _layout(token, [_plain(np.arange(side**2)), *lines], 1 + rows * columns, side)


def single(token: int, side: int) -> Layout:
    """An image as one tile with a newline at its end."""
    return _layout(token, [_plain(np.arange(side**2)), NEWLINE], 1, side)


def video(token: int, side: int, frames: int) -> Layout:
    """Frames of half a tile's features along each edge, one newline at the end of all."""
    half = math.ceil(side / 2)
    index, weight = _shrink(np.arange(side**2).reshape(side, side), half, half)
    index, weight = index.reshape(-1, 4), weight.reshape(-1, 4)
    pooled = [(index + frame * side**2, weight) for frame in range(frames)]
    return _layout(token, [*pooled, NEWLINE], frames, side)


def _plain(places: np.ndarray) -> Mix:
    return places[..., None], np.ones((*places.shape, 1))


def _unpad(places: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The lines or columns of a padded picture that show its image, whole features only.

    Rounded to seven digits as LLaVA-NeXT does, or an image that fills its tiles loses a line.
    """
    (height, width), (rows, columns) = size, places.shape
    if width / height > columns / rows:
        margin = (rows - int(round(height * (columns / width), 7))) // 2
        return places[margin : rows - margin]
    margin = (columns - int(round(width * (rows / height), 7))) // 2
    return places[:, margin : columns - margin]


def _shrink(places: np.ndarray, height: int, width: int) -> Mix:
    """The picture at another size, bilinearly: every token mixes its four neighbours.

    Places are taken at pixel centres (torch's `align_corners=False`), without antialiasing.

    Returns:
      [height, width, 4] each.
    """
    rows, columns = (_neighbours(*n) for n in zip(places.shape, (height, width), strict=True))
    index = [places[np.ix_(row, column)] for row, _ in rows for column, _ in columns]
    weight = [np.outer(row, column) for _, row in rows for _, column in columns]
    return np.stack(index, axis=-1), np.stack(weight, axis=-1)


def _neighbours(old: int, new: int) -> tuple[tuple[np.ndarray, np.ndarray], ...]:
    """The two old places that each of `new` ones lies between, and their weights."""
    at = np.maximum((np.arange(new) + 0.5) * (old / new) - 0.5, 0)
    low = at.astype(int)
    return (low, 1 - (at - low)), (np.minimum(low + 1, old - 1), at - low)


def _layout(token: int, parts: Sequence[Mix], slots: int, side: int) -> Layout:
    """Runs of tokens one after another; those of fewer vectors are padded with weight 0."""
    width = max(index.shape[-1] for index, _ in parts)
    index, weight = (
        np.concatenate([np.pad(x, ((0, 0), (0, width - x.shape[-1]))) for x in column])
        for column in zip(*parts, strict=True)
    )
    ids = np.full(len(index), token, np.int32)
    return Layout(ids, index.astype(np.int32), weight.astype(np.float32), slots, slots * side**2)
