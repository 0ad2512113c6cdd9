"""Stacks of like layers, run by scans: one of a uniform decoder, one in another where they differ.

A stack's arrays are never cut into pieces, which would copy weights that are sharded: the leading
axis [repeats * count] is read as [repeats, count], the scan over repeats takes a row of it, and the
scan over a run takes the row's layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from mmpo_jax.models.layer_kinds import Segment, Stack

Body = Callable[[Any, Any], tuple[Any, Any]]
"""(state, what a layer is given) -> (state, what it gives)."""


def scan_segment(
    segment: Segment,
    bodies: Mapping[str, Body],
    state: Any,
    given: Mapping[str, Any],
    *,
    in_place: bool,
) -> tuple[Any, dict[str, Any]]:
    """Runs the layers of a segment.

    Args:
      segment: which layers, in which order.
      bodies: by stack, what one layer computes.
      state: what goes from layer to layer.
      given: by stack, a pytree of [repeats * count, ...], sliced for its layers.
      in_place: whether every layer is read where it lies in its stack. A row of a run is copied
        else, which takes less time than what many tokens do with it; but gradients by what is
        found by its number cost a pass over the whole stack for every layer.

    Returns:
      (state, by stack a pytree of [repeats * count, ...]).
    """
    if segment.repeats == 1:
        outputs = {}
        for stack in segment.stacks:
            path = stack.path
            state, outputs[path] = jax.lax.scan(bodies[path], state, given[path])
        return state, outputs

    def repeat(state: Any, inputs: tuple[Any, Any]) -> tuple[Any, dict[str, Any]]:
        number, rows = inputs
        outputs = {}
        for stack in segment.stacks:
            path, body = stack.path, bodies[stack.path]
            if path in rows:
                run = body if stack.count == 1 else _scanned(body)
                state, outputs[path] = run(state, rows[path])
            else:
                numbers = number * stack.count + jnp.arange(stack.count)
                state, outputs[path] = jax.lax.scan(_found(body, given[path]), state, numbers)
        return state, outputs

    rows = {
        stack.path: jax.tree.map(lambda leaf, stack=stack: _rows(leaf, stack), given[stack.path])
        for stack in segment.stacks
        if stack.count == 1 or not in_place
    }
    state, outputs = jax.lax.scan(repeat, state, (jnp.arange(segment.repeats), rows))
    flat = {
        stack.path: outputs[stack.path]
        if stack.count == 1
        else jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), outputs[stack.path])
        for stack in segment.stacks
    }
    return state, flat


def _rows(leaf: jax.Array, stack: Stack) -> jax.Array:
    """[repeats * count, ...] as [repeats, count, ...]."""
    return leaf if stack.count == 1 else leaf.reshape(-1, stack.count, *leaf.shape[1:])


def _scanned(body: Body) -> Body:
    return lambda state, inputs: jax.lax.scan(body, state, inputs)


def _found(body: Body, stack: Any) -> Body:
    """The body of a layer that is told its number in the stack."""

    def run(state: Any, number: jax.Array) -> tuple[Any, Any]:
        def take(leaf: jax.Array) -> jax.Array:
            return jax.lax.dynamic_index_in_dim(leaf, number, keepdims=False)

        return body(state, jax.tree.map(take, stack))

    return run
