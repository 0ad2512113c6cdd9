"""Image features where tokens stand: each token reads a few vectors of its row's pool."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

BLOCK = 512
"""Vectors of a pool whose gradients are computed at a time."""


@jax.custom_vjp
def mixed(
    pool: Float[Array, "B F D"], index: Int[Array, "B *S K"], weight: Float[Array, "B *S K"]
) -> Float[Array, "B *S D"]:
    """Sums of K vectors of a pool each, anything where the index is negative.

    The gradient is that of the pool alone. On TPUs it is made of products with the weights as a
    matrix: the scatter that it would be takes one row at a time there, and its compiler 20 seconds
    for each of the K with seven thousand tokens.
    """
    total: Any = 0
    for k in range(index.shape[-1]):
        chosen = jax.vmap(lambda rows, at: rows[at])(pool, jnp.maximum(index[..., k], 0))
        total += chosen * weight[..., k : k + 1].astype(chosen.dtype)
    return total


def _mixed(pool: Any, index: Any, weight: Any) -> tuple[Any, Any]:
    return mixed(pool, index, weight), (pool, index, weight)


def _pool_gradient(kept: Any, grad: Float[Array, "B *S D"]) -> tuple[Any, None, Any]:
    pool, index, weight = kept
    b, _, d = pool.shape
    read = index.reshape(b, -1, index.shape[-1]), weight.reshape(b, -1, index.shape[-1])
    found = jax.lax.platform_dependent(
        grad.reshape(b, -1, d),
        *read,
        tpu=functools.partial(by_products, size=pool.shape[1]),
        default=functools.partial(by_scatter, size=pool.shape[1]),
    )
    return found.astype(pool.dtype), None, jnp.zeros_like(weight)


mixed.defvjp(_mixed, _pool_gradient)


def by_scatter(
    grad: Float[Array, "B S D"],
    index: Int[Array, "B S K"],
    weight: Float[Array, "B S K"],
    size: int,
) -> Float[Array, "B F D"]:
    """The gradient of a pool of `size` vectors, by adding up those of its readers."""

    def of_row(grad: jax.Array, index: jax.Array, weight: jax.Array) -> jax.Array:
        total = jnp.zeros((size, grad.shape[-1]), grad.dtype)
        for k in range(index.shape[-1]):
            share = grad * weight[:, k : k + 1].astype(grad.dtype)
            total = total.at[jnp.maximum(index[:, k], 0)].add(share)
        return total

    return jax.vmap(of_row)(grad, index, weight)


def by_products(
    grad: Float[Array, "B S D"],
    index: Int[Array, "B S K"],
    weight: Float[Array, "B S K"],
    size: int,
) -> Float[Array, "B F D"]:
    """`by_scatter`, by products with the weights as a matrix, a block of the pool at a time."""
    b, _, d = grad.shape
    at, block = jnp.maximum(index, 0), min(BLOCK, size)
    blocks = -(-size // block)

    def add(number: jax.Array, total: jax.Array) -> jax.Array:
        vectors = number * block + jnp.arange(block)
        chosen = jnp.zeros((*at.shape[:2], block), grad.dtype)
        for k in range(index.shape[-1]):
            share = weight[..., k : k + 1].astype(grad.dtype)
            chosen += jnp.where(at[..., k : k + 1] == vectors, share, 0)
        part = jnp.einsum("bsf,bsd->bfd", chosen, grad)
        return jax.lax.dynamic_update_slice_in_dim(total, part, number * block, axis=1)

    total = jnp.zeros((b, blocks * block, d), grad.dtype)
    return jax.lax.fori_loop(0, blocks, add, total)[:, :size]
