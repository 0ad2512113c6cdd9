"""Rows in groups, each group times a matrix of its own: what experts compute.

`jax.lax.ragged_dot` is one kernel on TPU. Elsewhere XLA multiplies every row by the matrices of all
groups and masks, which is as many times the work as there are groups; so CPUs take blocks of rows
of one group after another, in a loop as long as there are blocks.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mmpo_jax.models.attention import platform

MAX_BLOCK, MIN_BLOCK = 128, 8
"""Rows that are multiplied at once on CPU."""
BLOCKS_PER_GROUP = 4
"""Of the mean group: the last block of a group is half empty in the mean."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def grouped_matmul(
    x: Float[Array, "N D"],
    kernels: Float[Array, "E D F"],
    sizes: Int[Array, " E"],
    whole: bool = True,
) -> Float[Array, "N F"]:
    """Rows times the kernel of their group.

    Args:
      x: [N, D], sorted by groups.
      kernels: [E, D, F].
      sizes: int32[E]: how many rows each group has.
      whole: whether every row is in a group; where not, those behind the last group give 0.

    Returns:
      [N, F] in the dtype of `x`.
    """
    return _behind(_product(x, kernels, sizes), sizes, whole)


def _forward(x: Any, kernels: Any, sizes: Any, whole: bool) -> tuple[jax.Array, Any]:
    return grouped_matmul(x, kernels, sizes, whole), (x, kernels, sizes)


def _backward(whole: bool, kept: Any, gradient: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    x, kernels, sizes = kept
    by_x = _product(gradient, kernels, sizes, transposed=True)
    return _behind(by_x, sizes, whole), _outer(x, gradient, kernels, sizes), None


grouped_matmul.defvjp(_forward, _backward)


def _behind(rows: jax.Array, sizes: jax.Array, whole: bool) -> jax.Array:
    """The rows, 0 behind the last group: what stands there is nobody's."""
    if whole:
        return rows
    return jnp.where((jnp.arange(len(rows)) < sizes.sum())[:, None], rows, 0)


def _product(
    x: jax.Array, kernels: jax.Array, sizes: jax.Array, transposed: bool = False
) -> jax.Array:
    """Rows times the kernel of their group, or its transpose; anything behind the last group."""
    if platform() != "cpu":
        return jax.lax.ragged_dot(x, kernels.swapaxes(1, 2) if transposed else kernels, sizes)
    blocks = _Blocks(x, sizes)

    def step(number: jax.Array, made: jax.Array) -> jax.Array:
        kernel = blocks.of_group(kernels, number)
        product = blocks.rows(number) @ (kernel.T if transposed else kernel)
        # What a block computes behind its group, the next one overwrites.
        return jax.lax.dynamic_update_slice_in_dim(made, product, blocks.start[number], 0)

    width = kernels.shape[1 if transposed else 2]
    made = _zeros((len(x) + blocks.size, width), x.dtype, x, kernels)
    return jax.lax.fori_loop(0, blocks.count, step, made)[: len(x)]


def _outer(x: jax.Array, gradient: jax.Array, kernels: jax.Array, sizes: jax.Array) -> jax.Array:
    """The gradient of the kernels, [E, D, F]."""
    if platform() != "cpu":
        dimensions = jax.lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), (0,), ())
        return jax.lax.ragged_dot_general(x, gradient, sizes, dimensions).astype(kernels.dtype)
    blocks, of_gradient = _Blocks(x, sizes), _Blocks(gradient, sizes)
    wide = jnp.promote_types(kernels.dtype, jnp.float32)  # of a group that is several blocks

    def step(number: jax.Array, made: jax.Array) -> jax.Array:
        rows = jnp.where(blocks.is_own(number)[:, None], blocks.rows(number), 0)
        product = jnp.matmul(rows.T, of_gradient.rows(number), preferred_element_type=wide)
        group = blocks.group[number]
        total = jax.lax.dynamic_index_in_dim(made, group, keepdims=False) + product
        return jax.lax.dynamic_update_index_in_dim(made, total, group, 0)

    made = _zeros(kernels.shape, wide, x, kernels)
    return jax.lax.fori_loop(0, blocks.count, step, made).astype(kernels.dtype)


class _Blocks:
    """Rows [N, D] cut into blocks of one static size, none of which has rows of two groups."""

    def __init__(self, x: jax.Array, sizes: jax.Array):
        mean = len(x) // (len(sizes) * BLOCKS_PER_GROUP)
        self.size = min(MAX_BLOCK, max(MIN_BLOCK, 1 << max(0, mean.bit_length() - 1)))
        ends = jnp.cumsum(sizes)
        last = jnp.cumsum(-(-sizes // self.size))
        self.count = last[-1]
        numbers = jnp.arange(len(x) // self.size + len(sizes))
        self.group = jnp.searchsorted(last, numbers, side="right").clip(max=len(sizes) - 1)
        behind = (last[self.group] - numbers) * self.size
        whole = -(-sizes // self.size) * self.size
        self.start = (ends - sizes + whole)[self.group] - behind
        self.left = ends[self.group] - self.start
        self.x = jnp.pad(x, ((0, self.size), (0, 0)))

    def rows(self, number: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(self.x, self.start[number], self.size)

    def is_own(self, number: jax.Array) -> jax.Array:
        """bool[size]: which rows of a block are of its group."""
        return jnp.arange(self.size) < self.left[number]

    def of_group(self, kernels: jax.Array, number: jax.Array) -> jax.Array:
        return jax.lax.dynamic_index_in_dim(kernels, self.group[number], keepdims=False)


def _zeros(shape: tuple[int, ...], dtype: Any, *others: jax.Array) -> jax.Array:
    """Zeros that a loop may fill with what follows from other arrays: within `shard_map` they have
    to differ over the axes of the mesh that those do."""
    axes = frozenset().union(*(jax.typeof(other).manual_axis_type.varying for other in others))
    zeros = jnp.zeros(shape, dtype)
    return jax.lax.pcast(zeros, tuple(sorted(axes)), to="varying") if axes else zeros
