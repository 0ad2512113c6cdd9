"""Digests of arrays, taken where they lie: equal on any devices, another where any bit is."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, UInt32

from mmpo_jax.core.processes import in_shares, member

SEED = 0x9E3779B9
UNSIGNED = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}
"""Bytes of a number -> what its bits are read as; those of 8 bytes are two words."""
MODULUS = 1 << 32


def digests(tree: Any) -> dict[str, int]:
    """Path -> digest, 32 bits, of every array of a tree.

    It is the sum, modulo 2^32, of the words of an array, each hashed with its place in the whole
    array. Such a sum does not depend on its order, and so not on how an array is split: every
    device hashes its part, without the others, and a number of each goes to the host. Zeros add
    nothing, so it does not depend either on the zeros by which a mesh fills vocabularies up. As the
    hash (the finalizer of MurmurHash3, Appleby 2011) is a bijection, one changed word changes the
    digest for certain; other damage is missed once in 2^32.

    Of arrays that several processes hold, all of them have to call this.

    Args:
      tree: arrays, on devices or of NumPy, of numbers of at most 8 bytes.
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    parts: dict[str, list[Any]] = {}
    shared: set[str] = set()
    for path, leaf in leaves:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        parts[name] = list(_part_digests(leaf))
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            shared.add(name)
    own = {
        name: sum(np.asarray(value).item() for value in values)
        for name, values in jax.device_get(parts).items()
    }
    found = dict(own)
    if shared:
        count = member().count
        told = in_shares(
            lambda take: take(), [lambda: {name: own[name] for name in shared}] * count
        )
        found |= {name: sum(each[name] for each in told) for name in shared}
    return {name: value % MODULUS for name, value in found.items()}


def _part_digests(leaf: Any) -> Iterator[Any]:
    """The digests of an array's parts that this process holds; of copies of a part, one process's
    alone."""
    if not isinstance(leaf, jax.Array):
        # To the host at once, so that one array at a time is on a device.
        yield int(_digest(leaf, np.zeros(np.ndim(leaf), np.uint32)))
        return
    own = [shard for shard in leaf.addressable_shards if shard.replica_id == 0]
    place: Any = leaf.sharding
    on_mesh = isinstance(place, NamedSharding) and isinstance(place.mesh, Mesh)
    if on_mesh and place.memory_kind in (None, "device"):
        with jax.set_mesh(place.mesh):  # which may not be that of training
            found = _on_all_devices(place.mesh, place.spec)(leaf)
        by_device = {shard.device: shard.data for shard in found.addressable_shards}
        yield from (by_device[shard.device] for shard in own)
        return
    for shard in own:
        first = np.array([part.start or 0 for part in shard.index], np.uint32)
        waits = place.memory_kind != shard.device.default_memory().kind
        part = np.asarray(shard.data) if waits else shard.data  # on the host
        with jax.set_mesh(_alone(shard.device)):
            digest = _digest(part, first)
        yield digest


@functools.cache
def _on_all_devices(mesh: Mesh, spec: PartitionSpec) -> Callable[[Array], UInt32[Array, " D"]]:
    """Array -> the digest of each device's part, on that device: one program for all of them."""

    def of_part(part: Array) -> UInt32[Array, " 1"]:
        axes = [*spec, *[None] * (part.ndim - len(spec))]
        places = [jax.lax.axis_index(axis) if axis else 0 for axis in axes]
        first = [jnp.uint32(place) * size for place, size in zip(places, part.shape, strict=True)]
        return _digest(part, jnp.array(first, jnp.uint32))[None]

    over_all = PartitionSpec(mesh.axis_names)
    return jax.jit(jax.shard_map(of_part, mesh=mesh, in_specs=spec, out_specs=over_all))


@functools.cache
def _alone(device: jax.Device) -> Mesh:
    """A mesh of one device."""
    return jax.make_mesh((1,), ("x",), axis_types=(AxisType.Auto,), devices=[device])


@jax.jit
def _digest(part: Array, first: UInt32[Array, " axes"]) -> UInt32[Array, ""]:
    """The digest of a part of an array.

    Args:
      part: of the array.
      first: index of its first number in the whole array, by axis; an argument, as the compiler
        would compute the places of all words itself.
    """
    words = _words(part)
    place = jnp.uint32(SEED)
    for axis in range(words.ndim):
        along = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        place = _mixed(place + along + (first[axis] if axis < part.ndim else 0))
    hashed = _mixed(words ^ place) - _mixed(jnp.broadcast_to(place, words.shape))
    return jnp.sum(hashed, dtype=jnp.uint32)


def _words(part: Array) -> UInt32[Array, "..."]:
    if part.dtype == jnp.bool_:
        part = part.astype(jnp.uint8)
    bits = jax.lax.bitcast_convert_type(part, UNSIGNED[part.dtype.itemsize])
    return bits.astype(jnp.uint32)


def _mixed(words: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    words = (words ^ (words >> 16)) * np.uint32(0x85EBCA6B)
    words = (words ^ (words >> 13)) * np.uint32(0xC2B2AE35)
    return words ^ (words >> 16)
