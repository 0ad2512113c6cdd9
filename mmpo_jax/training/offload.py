"""Moments that wait in the host's memory, and are on a device a layer at a time.

All of an optimizer's state would not do: fetched at once, or by pieces in a row, the compiler
brings it to the device before the step has room for it. In a loop over layers it brings one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

HOST = "pinned_host"
"""JAX's name for that memory."""
STACKED = "/layers/"
"""In the paths of parameters that have all layers of a tower."""


class Streamed(optax.GradientTransformationExtraArgs):
    """A transformation whose moments wait on the host. `update` takes `accept`, a bool[], besides:
    where it is false, the state stays."""


def is_on_host(leaf: Any) -> bool:
    """Whether an array, or what stands for one, is in the host's memory."""
    return bool(leaf.sharding.memory_kind == HOST)


def streamed(
    direction: optax.GradientTransformation, clip: optax.GradientTransformation
) -> Streamed:
    """The transformation of a flat path -> float32 array, layer by layer.

    Args:
      direction: does to each array what it would do to it alone, and to a layer of a stack what it
        would do to that alone; its state has arrays of their parameters' shapes under their paths,
        and counters.
      clip: of the whole gradient, before; it keeps nothing.
    """

    def update(
        grads: Mapping[str, jax.Array], state: Any, params: Any = None, *, accept: Any
    ) -> tuple[dict[str, jax.Array], Any]:
        clipped: Any = clip.update(grads, clip.init(params), params)[0]
        updates: dict[str, jax.Array] = {}
        after = state
        for count, paths in _by_layers(params).items():
            own_grads, own_params = (
                {path: tree[path] for path in paths} for tree in (clipped, params)
            )
            own = _of_paths(state, params, paths)
            run = _at_once if count is None else functools.partial(_over_layers, count)
            found, part = run(direction.update, accept, own_grads, own_params, own)
            updates |= found
            after = _with_paths(after, params, part)
        return {path: updates[path] for path in grads}, after

    return Streamed(direction.init, update)


Update = Callable[..., tuple[Any, Any]]
"""(gradients, state, parameters) -> (updates, state after them)."""


def _at_once(
    update: Update, accept: jax.Array, grads: Any, params: Any, state: Any
) -> tuple[Any, Any]:
    """(updates, state with moments on the host after them) of arrays that are no stacks."""
    here = _moments(functools.partial(_moved, jax.memory.Space.Device), state, params)
    updates, after = update(grads, here, params)
    after = jax.tree.map(lambda new, old: jnp.where(accept, new, old), after, here)
    return updates, _moments(functools.partial(_moved, jax.memory.Space.Host), after, params)


def _moved(space: Any, leaf: jax.Array) -> jax.Array:
    return jax.device_put(leaf, space)


def _over_layers(
    count: int, update: Update, accept: jax.Array, grads: Any, params: Any, state: Any
) -> tuple[Any, Any]:
    """`_at_once` for stacks of so many layers, one layer after another."""

    def one(layer: jax.Array, carried: tuple[Any, Any]) -> tuple[Any, Any]:
        def of_layer(leaf: jax.Array) -> jax.Array:
            return jax.lax.dynamic_slice_in_dim(leaf, layer, 1)

        def put(whole: jax.Array, part: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_slice_in_dim(whole, part, layer, 0)

        updates, moments = carried
        # Counters are those before the step, for every layer.
        own = _moments(lambda _, leaf: of_layer(leaf), state, params, moments)
        own_grads, own_params = jax.tree.map(of_layer, (updates, params))
        found, after = _at_once(update, accept, own_grads, own_params, own)
        updates = jax.tree.map(put, updates, found)
        return updates, _moments(lambda part, whole: put(whole, part), after, params, moments)

    # Updates take the place of the gradients they are made of.
    return jax.lax.fori_loop(0, count, one, (grads, state))


def _moments(
    function: Callable[..., Any], state: Any, params: Mapping[str, Any], *others: Any
) -> Any:
    """The state with a function of its moments, and of those of other states; else as it is."""
    return jax.tree.map(
        lambda leaf, *more: jax.tree.map(function, leaf, *more) if isinstance(leaf, dict) else leaf,
        state,
        *others,
        is_leaf=lambda leaf: _is_by_path(leaf, params),
    )


def _by_layers(params: Mapping[str, jax.Array]) -> dict[int | None, list[str]]:
    """Paths by the number of layers in their stack, None where they are in none."""
    found: dict[int | None, list[str]] = {}
    for path, leaf in params.items():
        found.setdefault(leaf.shape[0] if STACKED in path else None, []).append(path)
    return found


def _of_paths(state: Any, params: Mapping[str, Any], paths: Sequence[str]) -> Any:
    """An optimizer's state for some of the parameters."""
    return jax.tree.map(
        lambda leaf: (
            {path: leaf[path] for path in paths if path in leaf} if isinstance(leaf, dict) else leaf
        ),
        state,
        is_leaf=lambda leaf: _is_by_path(leaf, params),
    )


def _with_paths(state: Any, params: Mapping[str, Any], part: Any) -> Any:
    """The state with what `part` has of it."""
    return jax.tree.map(
        lambda whole, own: whole | own if isinstance(whole, dict) else own,
        state,
        part,
        is_leaf=lambda leaf: _is_by_path(leaf, params),
    )


def _is_by_path(tree: Any, params: Mapping[str, Any]) -> bool:
    return isinstance(tree, dict) and tree.keys() <= params.keys()
