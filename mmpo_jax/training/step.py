"""The train state and the jitted step: accumulate, clip, update, refuse what is not finite."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mmpo_jax.models.huggingface import flatten, unflatten
from mmpo_jax.models.model import Model, Params
from mmpo_jax.objectives.sums import Sums, mean
from mmpo_jax.parallel.mesh import param_shardings

LossFunction = Callable[[Params, Any], Sums]
"""(parameters, micro-batch) -> sums."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What a step reads and replaces; donated to it."""

    step: jax.Array
    """int32[]: updates done."""
    params: dict[str, jax.Array]
    """float32, path -> array: what is trained."""
    frozen: dict[str, jax.Array]
    """path -> array: what is not."""
    optimizer: Any
    """optax state of `params`."""


def trainable_paths(paths: list[str], frozen: tuple[str, ...]) -> list[str]:
    """The parameter paths that no regular expression in `frozen` matches as a whole.

    Raises:
      ValueError: a pattern matches nothing, or everything is frozen.
    """
    for pattern in frozen:
        if not any(re.fullmatch(pattern, path) for path in paths):
            raise ValueError(f"freeze: {pattern!r} matches no parameter, such as {paths[0]!r}")
    kept = [path for path in paths if not any(re.fullmatch(p, path) for p in frozen)]
    if not kept:
        raise ValueError(f"freeze: {list(frozen)} leaves nothing to train")
    return kept


def merge(state: TrainState) -> Params:
    """The whole parameter tree of a state."""
    return unflatten({**state.params, **state.frozen})


def create_state(
    params: Params,
    model: Model,
    optimizer: optax.GradientTransformation,
    frozen: tuple[str, ...],
    mesh: Mesh,
) -> TrainState:
    """A fresh state on the mesh; the optimizer's moments are sharded like their parameters."""
    shardings = flatten(param_shardings(params, model.rules, mesh))
    flat = flatten(params)
    kept = trainable_paths(list(flat), frozen)

    def place(path: str, dtype: Any = None) -> jax.Array:
        leaf = flat[path] if dtype is None else flat[path].astype(dtype)
        # A copy, because the step donates its state and the caller may keep its arrays.
        return jnp.copy(jax.device_put(leaf, shardings[path]))

    trained = {path: place(path, jnp.float32) for path in kept}
    constants = {path: place(path) for path in flat if path not in trained}
    moments = jax.jit(optimizer.init, out_shardings=optimizer_shardings(optimizer, trained, mesh))(
        trained
    )
    step = jax.device_put(jnp.int32(0), NamedSharding(mesh, PartitionSpec()))
    return TrainState(step, trained, constants, moments)


def optimizer_shardings(
    optimizer: optax.GradientTransformation, params: dict[str, Any], mesh: Mesh
) -> Any:
    """Moments live where their parameters do; counters are replicated."""
    replicated = NamedSharding(mesh, PartitionSpec())
    return optax.tree_map_params(
        optimizer,
        lambda _, param: param.sharding,
        jax.eval_shape(optimizer.init, params),
        params,
        transform_non_params=lambda _: replicated,
    )


def make_step(
    loss: LossFunction,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    state: TrainState,
    compute_dtype: Any = jnp.float32,
) -> Callable[[TrainState, Any], tuple[TrainState, dict[str, jax.Array]]]:
    """The compiled train step.

    A batch arrives as micro-batches stacked on a leading axis. Gradients of the summed losses are
    added up and divided once by the summed weights, so the result does not depend on how the
    batch is cut. A step whose loss or gradient is not finite changes nothing but the step count,
    and reports `finite` = 0.

    Args:
      loss: sums of one micro-batch.
      optimizer: optax transformation; clipping included.
      schedule: the learning rate by step, for the report.
      state: a state as `create_state` makes it; its shardings are kept.
      compute_dtype: parameters are cast to it for the forward and backward pass.

    Returns:
      step(state, micro_batches) -> (state, metrics); the state is donated.
    """
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)

    def cast(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: leaf.astype(compute_dtype), tree)

    def micro_loss(trained: dict, frozen: dict, batch: Any) -> tuple[jax.Array, Sums]:
        sums = loss(unflatten({**cast(trained), **cast(frozen)}), batch)
        return sums.loss, sums

    gradient = jax.grad(micro_loss, has_aux=True)

    def accumulate(state: TrainState, batches: Any) -> tuple[Any, Sums]:
        first = jax.tree.map(lambda leaf: leaf[0], batches)
        if jax.tree.leaves(batches)[0].shape[0] == 1:
            return gradient(state.params, state.frozen, first)
        zeros = jax.tree.map(
            lambda leaf: jnp.zeros(leaf.shape, leaf.dtype),
            jax.eval_shape(gradient, state.params, state.frozen, first),
        )

        def add(total: Any, batch: Any) -> tuple[Any, None]:
            part = gradient(state.params, state.frozen, batch)
            return jax.tree.map(jnp.add, total, part), None

        return jax.lax.scan(add, zeros, batches)[0]

    def step(state: TrainState, batches: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        gradients, sums = accumulate(state, batches)
        gradients = jax.tree.map(lambda g: mean(g, sums.weight), gradients)
        gradients = jax.lax.with_sharding_constraint(gradients, shardings.params)
        value, norm = mean(sums.loss, sums.weight), optax.global_norm(gradients)
        finite = jnp.isfinite(value) & jnp.isfinite(norm)
        updates, moments = optimizer.update(gradients, state.optimizer, state.params)
        updated = optax.apply_updates(state.params, updates)

        def keep(new: Any, old: Any) -> Any:
            return jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)

        metrics = {name: mean(*pair) for name, pair in sums.metrics.items()}
        metrics |= {
            "loss": value,
            "grad_norm": norm,
            "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
            "finite": finite.astype(jnp.float32),
        }
        params, moments = keep(updated, state.params), keep(moments, state.optimizer)
        return TrainState(state.step + 1, params, state.frozen, moments), metrics

    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))
