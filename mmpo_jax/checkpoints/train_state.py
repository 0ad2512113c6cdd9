"""The state of a training: what a step reads and replaces, and checkpoints keep."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from mmpo_jax.models.merging import SCALE
from mmpo_jax.models.quantized_base import is_quantized
from mmpo_jax.objectives.registry import State

NOT_HALTED = np.bool_(False)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What a step reads and replaces; donated to it, but for what is frozen."""

    step: jax.Array
    """int32[]: updates done."""
    params: dict[str, jax.Array]
    """path -> array, float32 or bfloat16: what is trained."""
    frozen: dict[str, jax.Array]
    """path -> array: what is not."""
    optimizer: Any
    """optax state of `params`."""
    reference: dict[str, jax.Array] = dataclasses.field(default_factory=dict)
    """path -> array of a reference that runs in the step: what is not in `frozen`; else empty."""
    objective_state: State = dataclasses.field(default_factory=dict)
    """What objectives keep from step to step, float32[] each."""
    is_halted: jax.Array | np.bool_ = NOT_HALTED
    """bool[]: whether a step was not finite, behind which nothing changes any more."""


def saved_params(state: TrainState) -> dict[str, jax.Array]:
    """What checkpoints hold of a state's parameters, by path: all of them, but of a quantised base,
    which its own files have, the adapters alone."""
    if not is_quantized(state.frozen):
        return {**state.params, **state.frozen}
    scales = {path: leaf for path, leaf in state.frozen.items() if path.endswith(f"/{SCALE}")}
    return {**state.params, **scales}


def abstract(tree: Any) -> Any:
    """Shapes, dtypes and shardings of arrays, without their numbers."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), tree
    )
