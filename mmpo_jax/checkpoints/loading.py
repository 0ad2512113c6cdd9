"""Tensors of files straight into arrays: on the host, or on the devices that hold them.

A parameter is put together in the shapes its devices hold, from rows that are read once and no
wider than needed, and goes to the devices before the next one is begun. So the host's memory
holds one parameter and a few rows at a time, and on CPU, where devices keep such buffers as they
are, nothing twice.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from mmpo_jax.checkpoints.safetensors_files import DTYPES, StoredTensor, check_range, read_rows
from mmpo_jax.core.progress import counted

READERS = 8
"""Rows are read and copied by so many threads: buckets answer slowly, but many at a time."""
READ_BYTES = 16 * 2**20
"""What a thread reads at once."""
COPY_ROWS = 128
"""Rows transposed at once: the columns of as many lie in the processor's cache."""
ALIGNMENT = 64
"""Alignment of buffers in bytes: what JAX needs to keep them as they are on CPU."""

Bounds = tuple[tuple[int, int], ...]
"""(start, stop) along every axis: what a device holds of an array."""

Change = Callable[[str, Any], Mapping[str, Any]]
"""(path, array) -> the arrays that take its place, by path."""


@dataclasses.dataclass(frozen=True)
class StoredParameter:
    """Where a parameter's values lie."""

    tensors: tuple[StoredTensor, ...]
    """The tensor of every layer where the parameter is stacked, of experts those of a layer behind
    each other; else the only one."""
    shape: tuple[int, ...]
    """Shape of the parameter; [L, ...] where it is stacked, [L, E, ...] of experts."""
    stack: int
    """How many axes of the shape a tensor does not have: 0, 1 for layers, 2 for their experts."""
    transposed: bool
    """Whether a tensor's rows are the last axis of the parameter: dense layers, [out, in] in
    files."""

    @property
    def row_axis(self) -> int:
        """The parameter's axis along which a tensor's rows lie."""
        return len(self.shape) - 1 if self.transposed else self.stack

    @property
    def rows(self) -> int:
        """How many rows a tensor has."""
        return self.shape[self.row_axis]

    @property
    def row_shape(self) -> tuple[int, ...]:
        """The other axes of a tensor."""
        inner = self.shape[self.stack :]
        return inner[:-1] if self.transposed else inner[1:]

    @property
    def columns(self) -> int:
        """How many numbers a row has."""
        return math.prod(self.row_shape)

    def at(self, number: int) -> tuple[int, ...]:
        """Where in the stack a tensor is."""
        return tuple(map(int, np.unravel_index(number, self.shape[: self.stack])))

    @property
    def dtype(self) -> np.dtype:
        """The narrowest that holds all layers."""
        return functools.reduce(jax.numpy.promote_types, (DTYPES[t.dtype] for t in self.tensors))


def load_arrays(
    sources: Mapping[str, StoredParameter],
    places: Mapping[str, jax.ShapeDtypeStruct] | None,
    dtype: Any,
    change: Change | None = None,
) -> dict[str, Any]:
    """Reads parameters one after another.

    Args:
      sources: by parameter path.
      places: by parameter path, shapes with shardings; rows that a shape has beyond those of the
        files are 0. None for NumPy arrays on the host.
      dtype: to cast to; None for that of the files.
      change: what becomes of each, before the next is read.

    Raises:
      ModelError: a file cannot be read, a number is not finite, or `dtype` does not hold it.
    """
    loaded: dict[str, Any] = {}
    with ThreadPoolExecutor(READERS) as pool:
        for path, source in counted(sources.items(), "reading weights", "parameters"):
            wanted = source.dtype if dtype is None else np.dtype(dtype)
            if places is None:
                loaded[path] = _read(source, [_whole(source)], wanted, pool)[_whole(source)]
            else:
                loaded[path] = _load_sharded(source, places[path], wanted, pool)
            if change is not None:
                loaded |= change(path, loaded.pop(path))
    return loaded


def _load_sharded(
    source: StoredParameter, place: jax.ShapeDtypeStruct, dtype: np.dtype, pool: ThreadPoolExecutor
) -> jax.Array:
    """A parameter on its devices, of which this process may have a part only."""
    shape, sharding = place.shape, place.sharding
    first = _reading_sharding(source, place)
    indices = first.addressable_devices_indices_map(shape).values()
    held = {_bounds(index, shape) for index in indices}
    buffers = _read(source, sorted(held), dtype, pool)
    array = jax.make_array_from_callback(shape, first, lambda index: buffers[_bounds(index, shape)])
    if first != sharding:
        array = jax.jit(lambda array: array, out_shardings=sharding)(array)
    return array.block_until_ready()  # the buffers are let go before the next ones are made


def _reading_sharding(source: StoredParameter, place: jax.ShapeDtypeStruct) -> NamedSharding:
    """How devices share the reading.

    Rows are read whole, but matrices are also split along their rows. With several processes each
    would read nearly everything; so there every device gets a share of the rows first, and the
    devices exchange among themselves.
    """
    sharding: NamedSharding = place.sharding
    devices = sharding.mesh.size
    rows = place.shape[source.row_axis]
    if sharding.is_fully_addressable or source.columns == 1 or rows % devices:
        return sharding
    axes: list[Any] = [None] * len(source.shape)
    axes[source.row_axis] = sharding.mesh.axis_names
    return NamedSharding(sharding.mesh, PartitionSpec(*axes))


def _read(
    source: StoredParameter, held: Sequence[Bounds], dtype: np.dtype, pool: ThreadPoolExecutor
) -> dict[Bounds, np.ndarray]:
    """New buffers for the given parts of a parameter, filled by the pool's threads."""
    buffers = {bounds: _aligned([stop - start for start, stop in bounds], dtype) for bounds in held}
    for bounds, buffer in buffers.items():
        first, end = bounds[source.row_axis]
        if end > source.rows:
            axis = (slice(None),) * source.row_axis
            buffer[(*axis, slice(max(0, source.rows - first), None))] = 0
    list(pool.map(lambda task: _copy_rows(source, buffers, *task), _tasks(source, held)))
    return buffers


def _tasks(source: StoredParameter, held: Sequence[Bounds]) -> Iterator[tuple[int, int, int]]:
    """(number of a tensor, first row, end) of what is read at once; no row that no buffer needs."""
    for number, tensor in enumerate(source.tensors):
        step = max(1, READ_BYTES // (source.columns * DTYPES[tensor.dtype].itemsize))
        needed = {bounds[source.row_axis] for bounds in held if _holds(bounds, source.at(number))}
        for first, end in sorted(needed):
            end = min(end, source.rows)
            for start in range(first, end, step):
                yield number, start, min(start + step, end)


def _holds(bounds: Bounds, at: tuple[int, ...]) -> bool:
    """Whether a part of a parameter has something of the tensor at this place in the stack."""
    return all(start <= place < stop for (start, stop), place in zip(bounds, at, strict=False))


def _copy_rows(
    source: StoredParameter,
    buffers: Mapping[Bounds, np.ndarray],
    number: int,
    start: int,
    stop: int,
) -> None:
    """Reads rows of one tensor and copies them to every buffer that holds them."""
    tensor, at = source.tensors[number], source.at(number)
    rows = read_rows(tensor, start, stop, source.columns)
    rows = rows.reshape(len(rows), *source.row_shape)
    for bounds, buffer in buffers.items():
        if not _holds(bounds, at):
            continue
        buffer = buffer[tuple(place - bounds[axis][0] for axis, place in enumerate(at))]
        inner = bounds[source.stack :]
        if source.transposed:
            buffer, inner = buffer.T, inner[::-1]
        first, end = inner[0]
        if not first <= start < end:
            continue
        held = rows[(slice(None), *(slice(*other) for other in inner[1:]))]
        for done in range(0, len(held), COPY_ROWS):
            block = held[done : done + COPY_ROWS]
            if not np.can_cast(block.dtype, buffer.dtype):
                with np.errstate(over="ignore"):  # told by name
                    block = block.astype(buffer.dtype)
                check_range(block, f"{tensor.file}: {tensor.name}")
            buffer[start - first + done :][: len(block)] = block


def _whole(source: StoredParameter) -> Bounds:
    return tuple((0, size) for size in source.shape)


def _bounds(index: Any, shape: Sequence[int]) -> Bounds:
    """(start, stop) along every axis of an index of slices, as shardings give it."""
    return tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))


def _aligned(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """An empty array whose bytes begin at a multiple of `ALIGNMENT`."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + ALIGNMENT, np.uint8)
    first = -memory.ctypes.data % ALIGNMENT
    return memory[first : first + size].view(dtype).reshape(shape)
