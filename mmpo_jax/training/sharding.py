"""Where the optimizer's state lives: beside the parameters it is of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mmpo_jax.training.offload import HOST, Streamed


def optimizer_shardings(
    optimizer: optax.GradientTransformation, params: Mapping[str, Any], mesh: Mesh
) -> Any:
    """A sharding for every array of the optimizer's state.

    Arrays shaped as their parameter are split like it. Rows, columns (Adafactor) and scales of
    blocks (8-bit moments) are split along the dimensions that they have of it; counters are
    everywhere. Moments of what is `Streamed` are in the host's memory.

    Args:
      optimizer: whose state has its arrays under the paths of their parameters.
      params: path -> array, or shape, with a NamedSharding.
      mesh: the devices.
    """
    everywhere = NamedSharding(mesh, PartitionSpec())

    def sharding(keys: Any, leaf: Any) -> Any:
        names = [getattr(key, "key", getattr(key, "name", None)) for key in keys]
        path = next((name for name in names if name in params), None)
        if path is None:
            return everywhere
        param = params[path]
        if isinstance(optimizer, Streamed):
            return param.sharding.with_memory_kind(HOST)
        if leaf.shape == param.shape:
            return param.sharding
        axes = [*param.sharding.spec, *[None] * (len(param.shape) - len(param.sharding.spec))]
        spec = _narrowed(axes, param.shape, leaf.shape, "v_col" in names, mesh)
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree_util.tree_map_with_path(sharding, jax.eval_shape(optimizer.init, params))


def _narrowed(
    axes: list[Any], whole: tuple[int, ...], shape: tuple[int, ...], is_column: bool, mesh: Mesh
) -> list[Any]:
    """The mesh axes of an array that has some of a parameter's dimensions."""
    if len(shape) == len(whole) and shape[:-1] == whole[:-1]:
        blocks = shape[-1]
        evenly = axes[-1] is None or blocks % mesh.shape[axes[-1]] == 0
        return axes if evenly else [*axes[:-1], None]
    # A row lacks the longer of the last two dimensions, of equal ones the latter; a column the
    # other.
    lacking = [i for i in (-2, -1) if len(whole) > 1 and _without(whole, i) == shape]
    if lacking:
        return _without(axes, lacking[0] if is_column else lacking[-1])
    return []


def _without(sequence: Any, place: int) -> Any:
    kept = list(sequence)
    del kept[place]
    return tuple(kept)
