"""The train state and the jitted step: accumulate, clip, update, refuse what is not finite."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from mmpo_jax.checkpoints.train_state import TrainState
from mmpo_jax.core.trees import flatten, unflatten
from mmpo_jax.models.buffers import is_buffer
from mmpo_jax.models.lora import cast_params, is_adapter, is_exact, with_dropout
from mmpo_jax.models.model import Model, Params
from mmpo_jax.models.reward_head import is_reward_head
from mmpo_jax.models.vocabulary import filled
from mmpo_jax.objectives.registry import State
from mmpo_jax.objectives.sums import Sums
from mmpo_jax.objectives.terms import Metrics
from mmpo_jax.parallel.mesh import param_shardings, put_whole, vocabulary_shards
from mmpo_jax.recipes.training import MovingReference
from mmpo_jax.training.losses import Loss
from mmpo_jax.training.offload import Streamed
from mmpo_jax.training.rounding import narrowed, widened
from mmpo_jax.training.sharding import optimizer_shardings

Update = Callable[[TrainState, Any], tuple[TrainState, Metrics]]
"""(state, micro-batches) -> (state, metrics)."""


def trainable_paths(paths: list[str], frozen: tuple[str, ...]) -> list[str]:
    """The parameter paths that no regular expression in `frozen` matches as a whole.

    Where there are adapters, all else is frozen but for a reward head, which may be new. What torch
    has as a buffer is never trained.

    Raises:
      ValueError: a pattern matches nothing, or everything is frozen.
    """
    for pattern in frozen:
        if not any(re.fullmatch(pattern, path) for path in paths):
            raise ValueError(f"freeze: {pattern!r} matches no parameter, such as {paths[0]!r}")
    candidates = [path for path in paths if not is_buffer(path)]
    if any(map(is_adapter, paths)):
        candidates = [path for path in paths if is_adapter(path) or is_reward_head(path)]
    kept = [path for path in candidates if not any(re.fullmatch(p, path) for p in frozen)]
    if not kept:
        raise ValueError(f"freeze: {list(frozen)} leaves nothing to train")
    return kept


def whole_params(state: TrainState) -> Params:
    """The whole parameter tree of a state."""
    return unflatten({**state.params, **state.frozen})


def create_state(
    params: Params,
    model: Model,
    optimizer: optax.GradientTransformation,
    frozen: tuple[str, ...],
    mesh: Mesh,
    *,
    param_dtype: Any = jnp.float32,
    reference_dtype: Any = None,
    keeps: State | None = None,
) -> TrainState:
    """A fresh state on the mesh; the optimizer's moments are sharded like their parameters.

    What is frozen is not copied where it lies on the mesh already.

    Args:
      params: what training starts from.
      model: the architecture.
      optimizer: makes its moments.
      frozen: see `trainable_paths`.
      mesh: the devices.
      param_dtype: of what is trained; what is wider is rounded to the nearest.
      reference_dtype: of a reference that runs in the step, which begins as a copy of what is
        trained: of adapters only, where these are; None where no reference runs.
      keeps: first values of what objectives keep from step to step.
    """
    shards = vocabulary_shards(mesh)
    flat = {path: filled(path, leaf, shards) for path, leaf in flatten(params).items()}
    shardings = flatten(param_shardings(unflatten(flat), model.rules, mesh))
    kept = trainable_paths(list(flat), frozen)

    def place(path: str) -> jax.Array:
        # A copy, because the step donates what it trains and the caller may keep its arrays.
        return jnp.copy(put_whole(flat[path].astype(param_dtype), shardings[path]))

    trained = {path: place(path) for path in kept}
    constants = {
        path: put_whole(leaf, shardings[path]) for path, leaf in flat.items() if path not in trained
    }
    places = optimizer_shardings(optimizer, trained, mesh)
    moments = jax.jit(lambda params: optimizer.init(widened(params)), out_shardings=places)(trained)
    replicated = NamedSharding(mesh, PartitionSpec())
    reference = {}
    if reference_dtype is not None:
        reference = {
            path: jnp.array(leaf, leaf.dtype if is_exact(path) else reference_dtype)
            for path, leaf in trained.items()
        }
    return TrainState(
        put_whole(np.int32(0), replicated),
        trained,
        constants,
        moments,
        reference,
        # A copy, as above.
        jax.tree.map(lambda leaf: jnp.copy(put_whole(leaf, replicated)), keeps or {}),
        put_whole(np.bool_(False), replicated),
    )


def make_step(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    state: TrainState,
    compute_dtype: Any = jnp.float32,
    dropout: float = 0.0,
    seed: int = 0,
    reference: MovingReference | None = None,
    teacher: Params | None = None,
) -> Update:
    """The compiled train step.

    A batch arrives as micro-batches stacked on a leading axis, and the result does not depend on
    how it is cut: every term of the loss is divided by its weight in the whole batch. Where a row's
    loss depends on other rows (`Loss.coupled`), several micro-batches are run twice: first for
    their outputs, from which the loss of the whole batch and its gradient by every output follow,
    then once more to take these gradients on to the parameters.

    A step whose loss or gradient is not finite changes nothing and halts the state: no step behind
    it changes anything either, and all of them report `finite` = 0. So the state is that of the
    last good step, however much later somebody looks.

    Gradients, updates and moments are those of float32 parameters; where these are kept in
    bfloat16, the updated ones are rounded stochastically, by keys of seed, step and path.

    Args:
      loss: of the recipe's objectives.
      optimizer: optax transformation; clipping included.
      schedule: the learning rate by step, for the report.
      state: a state as `create_state` makes it; its shardings are kept.
      compute_dtype: parameters are cast to it for the forward and backward pass.
      dropout: share of inputs that adapters drop.
      seed: of the dropout, whose keys are folded from it, the step and the micro-batch, and of
        rounding.
      reference: how it follows the policy, if it does.
      teacher: parameters of a teacher that is another model, on the mesh; they are neither donated
        nor kept in the state.

    Returns:
      step(state, micro_batches) -> (state, metrics); the state is donated but for `frozen`.
    """
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)

    def forward(
        taught: Params | None, trained: dict, state: TrainState, batch: Any, key: Any
    ) -> Any:
        params = cast_params(unflatten({**trained, **state.frozen}), compute_dtype)
        compared = None
        if state.reference:
            compared = cast_params(unflatten({**state.reference, **state.frozen}), compute_dtype)
        more = () if taught is None else (taught,)
        return loss.forward(with_dropout(params, dropout, key), compared, batch, *more)

    def gradients(
        state: TrainState, taught: Params | None, batches: Any
    ) -> tuple[Any, list[Sums], State]:
        run = functools.partial(forward, taught)
        count = jax.tree.leaves(batches)[0].shape[0]
        keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), state.step), count)
        if count == 1:
            return _whole(loss, run, state, *jax.tree.map(lambda x: x[0], (batches, keys)))
        accumulate = _accumulate_coupled if loss.coupled else _accumulate
        return accumulate(loss, run, state, batches, keys)

    def update(
        state: TrainState, frozen: dict, taught: Any, batches: Any
    ) -> tuple[TrainState, Metrics]:
        before = dataclasses.replace(state, frozen={})
        state = dataclasses.replace(state, params=widened(state.params), frozen=frozen)
        grads, sums, objective_state = gradients(state, taught, batches)
        grads = jax.lax.with_sharding_constraint(grads, shardings.params)
        value, norm = loss.value(sums), optax.global_norm(grads)
        finite = jnp.isfinite(value) & jnp.isfinite(norm) & ~state.is_halted
        updates, moments = _updated(optimizer, grads, state, finite)
        params = optax.apply_updates(state.params, updates)
        params = narrowed(params, before.params, seed, state.step)
        step = state.step + 1
        followed = state.reference
        if reference is not None:
            share = jnp.where(step % reference.every == 0, reference.mixup, 0.0)
            followed = jax.tree.map(lambda r, p: r + share * (p - r), followed, params)
        after = TrainState(step, params, {}, (), followed, objective_state)
        after = _accepted(finite, after, dataclasses.replace(before, optimizer=()))
        after = dataclasses.replace(after, optimizer=moments, is_halted=~finite)
        metrics = loss.metrics(sums) | {
            "loss": value,
            "grad_norm": norm,
            "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
            "finite": finite.astype(jnp.float32),
        }
        return after, metrics

    changing = dataclasses.replace(shardings, frozen={})
    compiled = jax.jit(update, donate_argnums=0, out_shardings=(changing, None))

    def step(state: TrainState, batches: Any) -> tuple[TrainState, Metrics]:
        changed = dataclasses.replace(state, frozen={})
        updated, metrics = compiled(changed, state.frozen, teacher, batches)
        return dataclasses.replace(updated, frozen=state.frozen), metrics

    return step


def _updated(
    optimizer: optax.GradientTransformation, grads: Any, state: TrainState, accept: jax.Array
) -> tuple[Any, Any]:
    """(updates, the optimizer's state after them); its state before where `accept` is false."""
    if isinstance(optimizer, Streamed):
        return optimizer.update(grads, state.optimizer, state.params, accept=accept)
    updates, after = optimizer.update(grads, state.optimizer, state.params)
    return updates, _accepted(accept, after, state.optimizer)


def _accepted(accept: jax.Array, after: Any, before: Any) -> Any:
    return jax.tree.map(lambda new, old: jnp.where(accept, new, old), after, before)


def _whole(
    loss: Loss, forward: Callable[..., Any], state: TrainState, batch: Any, key: Any
) -> tuple[Any, list[Sums], State]:
    """(gradient, sums, what objectives keep) of a batch that is run at once."""

    def value(trained: dict) -> tuple[Float[Array, ""], Any]:
        sums, objective_state = loss.sums(
            forward(trained, state, batch, key), batch, state.objective_state
        )
        return loss.value(sums), (sums, objective_state)

    grads, (sums, objective_state) = jax.grad(value, has_aux=True)(state.params)
    return grads, sums, objective_state


def _accumulate(
    loss: Loss, forward: Callable[..., Any], state: TrainState, batches: Any, keys: Any
) -> tuple[Any, list[Sums], State]:
    """`_whole` of micro-batches, one after another.

    Weights of sums depend on the data alone, so those of the whole batch are known before: every
    part is divided by them at once, and gradients add up.
    """
    weights = _weights(loss, forward, state, batches, keys)

    def value(trained: dict, batch: Any, key: Any) -> tuple[Float[Array, ""], list[Sums]]:
        sums, _ = loss.sums(forward(trained, state, batch, key), batch, state.objective_state)
        of_whole = [
            dataclasses.replace(part, weight=weight)
            for part, weight in zip(sums, weights, strict=True)
        ]
        return loss.value(of_whole), sums

    gradient = jax.grad(value, has_aux=True)

    def add(total: Any, inputs: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, gradient(state.params, *inputs)), None

    first = jax.tree.map(lambda x: x[0], (batches, keys))
    zeros = _zeros(jax.eval_shape(gradient, state.params, *first))
    (grads, sums), _ = jax.lax.scan(add, zeros, (batches, keys))
    return grads, sums, state.objective_state


def _accumulate_coupled(
    loss: Loss, forward: Callable[..., Any], state: TrainState, batches: Any, keys: Any
) -> tuple[Any, list[Sums], State]:
    """`_whole` of micro-batches whose rows depend on each other, each run twice."""

    def run(_: None, inputs: Any) -> tuple[None, Any]:
        return None, forward(state.params, state, *inputs)

    _, outputs = jax.lax.scan(run, None, (batches, keys))

    def value(outputs: Any) -> tuple[Float[Array, ""], Any]:
        outputs, batch = jax.tree.map(_joined, (outputs, batches))
        sums, objective_state = loss.sums(outputs, batch, state.objective_state)
        return loss.value(sums), (sums, objective_state)

    by_output, (sums, objective_state) = jax.grad(value, has_aux=True)(outputs)

    def add(total: Any, inputs: Any) -> tuple[Any, None]:
        batch, key, grads = inputs
        _, pull_back = jax.vjp(lambda trained: forward(trained, state, batch, key), state.params)
        return jax.tree.map(jnp.add, total, pull_back(grads)[0]), None

    grads, _ = jax.lax.scan(add, _zeros(state.params), (batches, keys, by_output))
    return grads, sums, objective_state


def _joined(x: jax.Array) -> jax.Array:
    """Micro-batches as one batch; -1 would not do for what is empty, as pixels of texts are."""
    return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])


def _weights(
    loss: Loss, forward: Callable[..., Any], state: TrainState, batches: Any, keys: Any
) -> list[jax.Array]:
    """The weight of every term in all micro-batches; the model is not run."""

    def of_one(inputs: Any) -> list[jax.Array]:
        batch, key = inputs
        outputs = _zeros(jax.eval_shape(forward, state.params, state, batch, key))
        return [part.weight for part in loss.sums(outputs, batch, state.objective_state)[0]]

    return [weights.sum(axis=0) for weights in jax.lax.map(of_one, (batches, keys))]


def _zeros(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), tree)
