"""Meshes of the simulated devices."""

import math

import jax
from jax.sharding import AxisType, Mesh

from mmpo_jax.parallel.mesh import AXES


def mesh_of(*sizes: int) -> Mesh:
    """A mesh of the first devices, with the sizes of `data`, `fsdp` and `tensor`."""
    devices = jax.devices()[: math.prod(sizes)]
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def one_device() -> Mesh:
    """A mesh of the first device alone."""
    return mesh_of(1, 1, 1)
