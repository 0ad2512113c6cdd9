"""The mesh with the axes `data`, `fsdp` and `tensor`, for mixtures also `expert`, and arrays placed
on it by rules."""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding

from mmpo_jax.core.errors import MmpoError
from mmpo_jax.core.trees import map_with_path
from mmpo_jax.models.layers import batch_axes, divisible, with_expert
from mmpo_jax.models.lora import adapter_spec, described_by
from mmpo_jax.models.vocabulary import filled, filled_shape

log = logging.getLogger(__name__)

AXES = ("data", "fsdp", "tensor")
AXES_OF_EXPERTS = ("data", "fsdp", "expert", "tensor")
"""Of a mesh that splits experts."""

Row = TypeVar("Row")
Sizes = tuple[int, int, int, int]
"""Of `AXES_OF_EXPERTS`."""


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
    data: int | None = None,
    fsdp: int | None = None,
    tensor: int | None = None,
    devices: Sequence[Any] | None = None,
    *,
    expert: int | None = None,
) -> Mesh:
    """A mesh of all devices, or of those given.

    Slices of TPUs are joined by the network of the data centre, which is slower than what joins
    the chips of one: `data` goes over them, so only gradients cross it, once a step. The other
    axes stay within a slice.

    Args:
      data: a multiple of the number of slices, which it is by default.
      fsdp: by default what the others leave.
      tensor: 1 by default.
      devices: all by default.
      expert: 1 by default, and then no axis of the mesh. Experts are split over it; all else is as
        over a larger `fsdp`.

    One size may be -1 and takes what the others leave.

    Raises:
      MmpoError: the sizes do not multiply to the number of devices, or do not fit the slices.
    """
    devices = jax.devices() if devices is None else list(devices)
    slices = by_slice(devices)
    sizes = _resolved((data, fsdp, expert, tensor), len(devices), len(slices))
    placed = within_slice(sizes, devices) if len(slices) == 1 else over_slices(sizes, slices)
    axes = AXES if sizes[2] == 1 else AXES_OF_EXPERTS
    placed = placed.reshape(
        [size for size, axis in zip(sizes, AXES_OF_EXPERTS, strict=True) if axis in axes]
    )
    mesh = Mesh(placed, axes, axis_types=(AxisType.Auto,) * len(axes))
    log.info("%s", told(mesh.shape, len(slices)))
    return mesh


def by_slice(devices: Sequence[Any]) -> list[list[Any]]:
    """Devices by the slices that they are in: one, but on TPUs that are joined by a network."""
    slices: dict[int, list[Any]] = {}
    for device in devices:
        of_several = device.platform == "tpu"
        number = getattr(device, "slice_index", 0) if of_several else 0
        slices.setdefault(number or 0, []).append(device)
    return [slices[number] for number in sorted(slices)]


def within_slice(sizes: Sizes, devices: Sequence[Any]) -> np.ndarray:
    """The devices of one slice as an array of such sizes, near ones beside each other."""
    return _whole_axes_if_possible(
        functools.partial(mesh_utils.create_device_mesh, sizes, list(devices))
    )


def over_slices(sizes: Sizes, slices: Sequence[Sequence[Any]]) -> np.ndarray:
    """The devices of several slices as an array of such sizes, the first of them over slices.

    Raises:
      MmpoError: the sizes do not fit the slices.
    """
    count, own = len(slices), len(slices[0])
    data, *others = sizes
    if any(len(devices) != own for devices in slices):
        raise MmpoError(f"the slices have {', '.join(str(len(each)) for each in slices)} devices")
    if data % count:
        raise MmpoError(
            f"devices.data is {data}, of {count} slices: rows are split over slices and weights "
            f"within one, so make it a multiple of {count}: devices.data={count} devices.fsdp=-1"
        )
    every = [device for each in slices for device in each]
    return _whole_axes_if_possible(
        functools.partial(
            mesh_utils.create_hybrid_device_mesh,
            (data // count, *others),
            (count, *[1] * len(others)),
            every,
        )
    )


def _whole_axes_if_possible(make: Callable[..., np.ndarray]) -> np.ndarray:
    """Devices placed so that whole sides of the torus make an axis of the mesh, or, where its sizes
    allow no such thing (8 x 32 of 16 x 16 chips), parts of them."""
    try:
        return make()
    except NotImplementedError:
        return make(allow_split_physical_axes=True)


def told(sizes: Mapping[str, int], slices: int = 1) -> str:
    """Sizes of a mesh for people, "mesh data 1 x fsdp 8 x tensor 1 of 8 devices"."""
    axes = " x ".join(f"{axis} {size}" for axis, size in sizes.items())
    count = int(np.prod(list(sizes.values())))
    return f"mesh {axes} of {count} devices" + (f" in {slices} slices" if slices > 1 else "")


def _resolved(given: tuple[int | None, ...], count: int, slices: int) -> Sizes:
    """Sizes that multiply to a number of devices.

    Raises:
      MmpoError: these do not.
    """
    left = 1 if -1 in given else -1
    defaults = (slices, left, 1, 1)
    sizes = [own if size is None else size for size, own in zip(given, defaults, strict=True)]
    known = int(np.prod([size for size in sizes if size != -1]))
    if sizes.count(-1) < 2 and count % known == 0:
        sizes = [count // known if size == -1 else size for size in sizes]
    if int(np.prod(sizes)) != count or -1 in sizes:
        axes = dict(zip(AXES_OF_EXPERTS, sizes, strict=True))
        named = {axis: size for axis, size in axes.items() if axis != "expert" or size != 1}
        asked = [axis for axis, size in zip(axes, given, strict=True) if size is not None]
        hint = _fitting(axes, asked, count, slices)
        raise MmpoError(f"mesh {named} does not fit {count} devices; {hint}")
    data, fsdp, expert, tensor = sizes
    return data, fsdp, expert, tensor


def _fitting(axes: Mapping[str, int], asked: Sequence[str], count: int, slices: int) -> str:
    """Which other size of one axis would fit a number of devices, for people.

    Args:
      axes: size by axis, -1 for what the others leave.
      asked: the axes whose sizes were given.
      count: of the devices.
      slices: that they are in, of which `data` is a multiple.
    """
    if [*axes.values()].count(-1) > 1:
        return "one size may be -1, for what the others leave"
    found = []
    for axis in asked:
        rest = math.prod(size for name, size in axes.items() if name != axis and size != -1)
        if axes[axis] == -1 or count % rest:
            continue
        left = count // rest
        sizes = range(1, left + 1) if -1 in axes.values() else (left,)
        would = [size for size in sizes if left % size == 0]
        would = [size for size in would if axis != "data" or size % slices == 0]
        if would:
            found.append(f"{axis} {' or '.join(map(str, would))}")
    if found:
        return f"with the others as they are, {', '.join(found)} would"
    return f"sizes have to multiply to {count}, and one may be -1 for what the others leave"


def batch_spec(mesh: Mesh) -> PartitionSpec:
    """How batches are split, row by row."""
    return PartitionSpec(batch_axes(mesh))


def batch_shards(mesh: Mesh) -> int:
    """Over how many devices the rows of a batch are split; batch sizes are multiples of it."""
    return math.prod(mesh.shape[axis] for axis in batch_axes(mesh))


def vocabulary_shards(mesh: Mesh) -> int:
    """Over how many devices the tokens of the vocabulary are split; tables are filled up to a
    multiple of it, see `models.vocabulary`."""
    return mesh.size // mesh.shape["data"]


def placed_shapes(abstract: Any, rules: tuple[tuple[str, PartitionSpec], ...], mesh: Mesh) -> Any:
    """Parameters as they lie on a mesh: shapes, with filled up vocabularies, and shardings.

    Args:
      abstract: parameter tree with shapes and dtypes.
      rules, mesh: see `param_shardings`.
    """
    shards = vocabulary_shards(mesh)
    shapes = map_with_path(
        lambda path, leaf: jax.ShapeDtypeStruct(filled_shape(path, leaf.shape, shards), leaf.dtype),
        abstract,
    )
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        shapes,
        param_shardings(shapes, rules, mesh),
    )


def param_shardings(abstract: Any, rules: tuple[tuple[str, PartitionSpec], ...], mesh: Mesh) -> Any:
    """A NamedSharding for every parameter, from the first rule that matches its whole path.

    A dimension that its axis does not divide stays whole. What a rule splits over `fsdp` is split
    over `expert` too, unless it names that itself. Adapters follow the rule of the kernel beside
    them.

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
                return NamedSharding(mesh, divisible(with_expert(spec, mesh), leaf.shape, mesh))
        raise ValueError(f"no sharding rule matches the parameter {path}")

    return map_with_path(sharding, abstract)


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
    sharding = NamedSharding(mesh, PartitionSpec(*([None] * leading), *batch_spec(mesh)))
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
    """Parameters on the mesh, sharded by the rules, vocabularies filled up."""
    shards = vocabulary_shards(mesh)
    params = map_with_path(lambda path, leaf: filled(path, leaf, shards), params)
    return jax.tree.map(put_whole, params, param_shardings(params, rules, mesh))


def put_whole(array: Any, sharding: Sharding) -> jax.Array:
    """An array on devices; one that is not there yet is whole, and the same, in all processes."""
    on_mesh = isinstance(array, jax.Array) and not array.is_fully_addressable
    if on_mesh or sharding.is_fully_addressable:
        return jax.device_put(array, sharding)
    host = np.asarray(array)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])
