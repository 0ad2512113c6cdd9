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
from mmpo_jax.models.lora import cast_params, is_adapter, with_dropout
from mmpo_jax.models.model import Model, Params
from mmpo_jax.objectives.sums import Sums, mean
from mmpo_jax.parallel.mesh import param_shardings

LossFunction = Callable[[Params, Any], Sums]
"""(parameters, micro-batch) -> sums."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What a step reads and replaces; donated to it, but for what is frozen."""

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

    Where there are adapters, all else is frozen.

    Raises:
      ValueError: a pattern matches nothing, or everything is frozen.
    """
    for pattern in frozen:
        if not any(re.fullmatch(pattern, path) for path in paths):
            raise ValueError(f"freeze: {pattern!r} matches no parameter, such as {paths[0]!r}")
    candidates = [path for path in paths if is_adapter(path)] or paths
    kept = [path for path in candidates if not any(re.fullmatch(p, path) for p in frozen)]
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
    """A fresh state on the mesh; the optimizer's moments are sharded like their parameters.

    What is frozen is not copied where it lies on the mesh already.
    """
    shardings = flatten(param_shardings(params, model.rules, mesh))
    flat = flatten(params)
    kept = trainable_paths(list(flat), frozen)

    def place(path: str) -> jax.Array:
        # A copy, because the step donates what it trains and the caller may keep its arrays.
        return jnp.copy(jax.device_put(flat[path].astype(jnp.float32), shardings[path]))

    trained = {path: place(path) for path in kept}
    constants = {
        path: jax.device_put(leaf, shardings[path])
        for path, leaf in flat.items()
        if path not in trained
    }
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
    dropout: float = 0.0,
    seed: int = 0,
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
      dropout: share of inputs that adapters drop.
      seed: of the dropout; its keys are folded from it, the step and the micro-batch.

    Returns:
      step(state, micro_batches) -> (state, metrics); the state is donated but for `frozen`.
    """
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)

    def micro_loss(trained: dict, frozen: dict, batch: Any, key: Any) -> tuple[jax.Array, Sums]:
        params = cast_params(unflatten({**trained, **frozen}), compute_dtype)
        sums = loss(with_dropout(params, dropout, key), batch)
        return sums.loss, sums

    gradient = jax.grad(micro_loss, has_aux=True)

    def accumulate(state: TrainState, batches: Any) -> tuple[Any, Sums]:
        count = jax.tree.leaves(batches)[0].shape[0]
        keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), state.step), count)
        first = jax.tree.map(lambda leaf: leaf[0], (batches, keys))
        if count == 1:
            return gradient(state.params, state.frozen, *first)
        zeros = jax.tree.map(
            lambda leaf: jnp.zeros(leaf.shape, leaf.dtype),
            jax.eval_shape(gradient, state.params, state.frozen, *first),
        )

        def add(total: Any, inputs: Any) -> tuple[Any, None]:
            part = gradient(state.params, state.frozen, *inputs)
            return jax.tree.map(jnp.add, total, part), None

        return jax.lax.scan(add, zeros, (batches, keys))[0]

    def update(state: TrainState, frozen: dict, batches: Any) -> tuple[TrainState, dict]:
        state = dataclasses.replace(state, frozen=frozen)
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
        return TrainState(state.step + 1, params, {}, moments), metrics

    moving = dataclasses.replace(shardings, frozen={})
    compiled = jax.jit(update, donate_argnums=0, out_shardings=(moving, None))

    def step(state: TrainState, batches: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        updated, metrics = compiled(dataclasses.replace(state, frozen={}), state.frozen, batches)
        return dataclasses.replace(updated, frozen=state.frozen), metrics

    return step
