"""The mesh with the axes `data`, `fsdp` and `tensor`, and arrays placed on it by rules."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding

from mmpo_jax.core.errors import MmpoError
from mmpo_jax.core.trees import map_with_path
from mmpo_jax.models.lora import adapter_spec, described_by

AXES = ("data", "fsdp", "tensor")
BATCH = PartitionSpec(("data", "fsdp"))
"""Batches are split over these axes, row by row."""

Row = TypeVar("Row")


@dataclasses.dataclass(frozen=True)
class Share:
    """The part of a batch's rows that a process makes, as its devices hold them."""

    shards: int = 1
    """Equal parts of the rows in all."""
    own: tuple[int, ...] = (0,)
    """Those of this process. A part on devices of several processes is made by each of them."""

    def of(self, rows: Sequence[Row]) -> list[Row]:
        """The process's own of all rows."""
        size = len(rows) // self.shards
        return [row for shard in self.own for row in rows[shard * size : (shard + 1) * size]]


WHOLE = Share()
"""All rows, which the one process there is makes."""


def make_mesh(
    data: int = 1, fsdp: int = -1, tensor: int = 1, devices: Sequence[Any] | None = None
) -> Mesh:
    """A mesh of all devices, or of those given; one size may be -1 and takes what the others leave.

    Raises:
      MmpoError: the sizes do not multiply to the number of devices.
    """
    sizes = [data, fsdp, tensor]
    count = jax.device_count() if devices is None else len(devices)
    known = int(np.prod([size for size in sizes if size != -1]))
    if sizes.count(-1) > 1 or (-1 in sizes and count % known):
        raise MmpoError(f"mesh {dict(zip(AXES, sizes, strict=True))} does not fit {count} devices")
    sizes = [count // known if size == -1 else size for size in sizes]
    if int(np.prod(sizes)) != count:
        raise MmpoError(f"mesh {dict(zip(AXES, sizes, strict=True))} does not fit {count} devices")
    return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def batch_shards(mesh: Mesh) -> int:
    """Over how many devices the rows of a batch are split; batch sizes are multiples of it."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def param_shardings(abstract: Any, rules: tuple[tuple[str, PartitionSpec], ...], mesh: Mesh) -> Any:
    """A NamedSharding for every parameter, from the first rule that matches its whole path.

    A dimension that its axis does not divide (a vocabulary of 32,003 over 8) stays whole. Adapters
    follow the rule of the kernel beside them.

    Args:
      abstract: parameter tree with shapes.
      rules: (regular expression, PartitionSpec), kept beside the model they describe.
      mesh: the devices.

    Raises:
      ValueError: a parameter that no rule matches.
    """

    def sharding(path: str, leaf: Any) -> NamedSharding:
        for pattern, spec in rules:
            if re.fullmatch(pattern, described_by(path)):
                spec = adapter_spec(path, spec, leaf.ndim)
                return NamedSharding(mesh, _divisible(spec, leaf.shape, mesh))
        raise ValueError(f"no sharding rule matches the parameter {path}")

    return map_with_path(sharding, abstract)


def _divisible(spec: PartitionSpec, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    axes = [
        axis if axis is None or size % mesh.shape[axis] == 0 else None
        for axis, size in zip(spec, shape, strict=False)
    ]
    return PartitionSpec(*axes)


def batch_share(mesh: Mesh) -> Share:
    """The rows of a batch that this process makes; its devices need not hold neighbouring ones."""
    shards = batch_shards(mesh)
    holders = mesh.devices.reshape(shards, -1)
    process = jax.process_index()
    own = (any(device.process_index == process for device in row) for row in holders)
    return Share(shards, tuple(shard for shard, is_own in enumerate(own) if is_own))


def put_batch(batch: Any, mesh: Mesh, leading: int = 0) -> Any:
    """A host batch as global arrays, rows split over the mesh.

    Args:
      batch: pytree of NumPy arrays, this process's rows (`batch_share`).
      mesh: the devices.
      leading: axes in front of the row axis (1 for stacked micro-batches).
    """
    sharding = NamedSharding(mesh, PartitionSpec(*([None] * leading), *BATCH))
    share = batch_share(mesh)

    def put(own: np.ndarray) -> jax.Array:
        own = np.asarray(own)
        size = own.shape[leading] // len(share.own)
        shape = list(own.shape)
        shape[leading] = size * share.shards

        def part(index: Any) -> Any:
            first = share.own.index((index[leading].start or 0) // size) * size
            return own[(slice(None),) * leading + (slice(first, first + size),)]

        return jax.make_array_from_callback(tuple(shape), sharding, part)

    return jax.tree.map(put, batch)


def gathered(tree: Any, mesh: Mesh) -> Any:
    """Arrays of a mesh as this process can read them: whole on each of its devices where there are
    several processes. Like every computation of theirs, all have to call it."""
    if jax.process_count() == 1:
        return tree
    return _replicate(mesh)(tree)


@functools.cache
def _replicate(mesh: Mesh) -> Any:
    return jax.jit(lambda tree: tree, out_shardings=NamedSharding(mesh, PartitionSpec()))


def put_params(params: Any, rules: tuple[tuple[str, PartitionSpec], ...], mesh: Mesh) -> Any:
    """Parameters on the mesh, sharded by the rules."""
    return jax.tree.map(put_whole, params, param_shardings(params, rules, mesh))


def put_whole(array: Any, sharding: Sharding) -> jax.Array:
    """An array on devices; one that is not there yet is whole, and the same, in all processes."""
    on_mesh = isinstance(array, jax.Array) and not array.is_fully_addressable
    if on_mesh or sharding.is_fully_addressable:
        return jax.device_put(array, sharding)
    host = np.asarray(array)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])
