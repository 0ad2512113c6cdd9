"""The mesh with the axes `data`, `fsdp` and `tensor`, and arrays placed on it by rules."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mmpo_jax.core.errors import MmpoError
from mmpo_jax.core.trees import map_with_path
from mmpo_jax.models.lora import adapter_spec, described_by

AXES = ("data", "fsdp", "tensor")
BATCH = PartitionSpec(("data", "fsdp"))
"""Batches are split over these axes, row by row."""


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


def put_batch(batch: Any, mesh: Mesh, leading: int = 0) -> Any:
    """A host batch as global arrays, rows split over the mesh.

    Args:
      batch: pytree of NumPy arrays, this process's rows.
      mesh: the devices.
      leading: axes in front of the row axis (1 for stacked micro-batches).
    """
    sharding = NamedSharding(mesh, PartitionSpec(*([None] * leading), *BATCH))
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)


def put_params(params: Any, rules: tuple[tuple[str, PartitionSpec], ...], mesh: Mesh) -> Any:
    """Host parameters on the mesh, sharded by the rules."""
    return jax.device_put(params, param_shardings(params, rules, mesh))
