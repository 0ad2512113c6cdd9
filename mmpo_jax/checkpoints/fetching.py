"""Parameters from the devices to the host, a little at a time.

The other way of `loading.py`: beside the parameters the host's memory holds what is being written.
JAX's arrays keep on the host what is fetched of them whole, so that never is.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from mmpo_jax.checkpoints.loading import COPY_ROWS, READ_BYTES
from mmpo_jax.checkpoints.tensor_names import Place
from mmpo_jax.core.trees import to_host

STRIP_BYTES = 64 * 2**20
"""What is written at once of a parameter that is not stacked: a vocabulary has more."""


def is_large(leaf: Any) -> bool:
    """Whether a parameter that devices of this process hold is more than is copied at once."""
    ours = isinstance(leaf, jax.Array) and leaf.is_fully_addressable
    return ours and leaf.nbytes > STRIP_BYTES


def at_place(array: Any, place: Place) -> Any:
    """What a parameter has at a place of its stack; all of it where it is none.

    Of experts that devices share it is put together on the host: on the devices, the compiler
    gathers all experts of all layers for every one of them.
    """
    if not place:
        return array
    is_shared = isinstance(array, jax.Array) and array.is_fully_addressable
    if len(place) == 1 or not is_shared:
        return array[place]
    made, axes = np.empty(array.shape[len(place) :], array.dtype), len(place)
    for shard in array.addressable_shards:
        own = [part.indices(size) for part, size in zip(shard.index, array.shape, strict=True)]
        held = zip(place, own[:axes], strict=True)
        if shard.replica_id == 0 and all(start <= at < stop for at, (start, stop, _) in held):
            at = tuple(number - start for number, (start, _, _) in zip(place, own, strict=False))
            made[shard.index[axes:]] = np.asarray(shard.data[at])
    return made


def in_strips(array: jax.Array, transposed: bool, count: int) -> Iterator[np.ndarray]:
    """The first `count` rows of an array, or of its transpose, a few at a time."""
    size = max(1, STRIP_BYTES * count // array.nbytes)
    for start in range(0, count, size):
        rows = slice(start, min(start + size, count))
        yield on_host(array, transposed, rows).T if transposed else on_host(array, False, rows)


def on_host(array: Any, transposed: bool, rows: slice = slice(None)) -> np.ndarray:
    """An array as NumPy's.

    Args:
      array: of the devices or of the host.
      transposed: whether the memory of the copy is that of its transpose.
      rows: which ones, of that memory.
    """
    axis = array.ndim - 1 if transposed else 0
    if isinstance(array, jax.Array) and array.is_fully_addressable and array.ndim:
        shards = array.addressable_shards
        parts = [(shard.index, shard.data) for shard in shards if shard.replica_id == 0]
    else:
        array = to_host(array)
        if not transposed:
            return array
        parts = [((slice(None),) * array.ndim, array)]
    start, stop, _ = rows.indices(array.shape[axis])
    shape = [*array.shape[:axis], stop - start, *array.shape[axis + 1 :]]
    made = np.empty(shape, array.dtype, order="F" if transposed else "C")
    for index, part in parts:
        first, end, _ = index[axis].indices(array.shape[axis])
        own = slice(max(first, start) - start, min(end, stop) - start)
        if own.start < own.stop:
            target = made[(*index[:axis], own, *index[axis + 1 :])]
            _copy_strips(part, target, axis, start + own.start - first)
    return made


def _copy_strips(array: Any, target: np.ndarray, axis: int, first: int) -> None:
    """Copies what one device, or the host, holds from `first` on along an axis."""
    count, before = target.shape[axis], (slice(None),) * axis
    size = max(1, READ_BYTES * count // max(1, target.nbytes))
    for start in range(0, count, size):
        length = min(size, count - start)
        if isinstance(array, jax.Array):
            found = jax.lax.dynamic_slice_in_dim(array, first + start, length, axis)
            strip = np.asarray(found)
        else:
            strip = array[(*before, slice(first + start, first + start + length))]
        place = target[(*before, slice(start, start + length))]
        for done in range(0, len(strip), COPY_ROWS):  # lies in the processor's cache
            place[done : done + COPY_ROWS] = strip[done : done + COPY_ROWS]
