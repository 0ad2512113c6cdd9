"""Stochastic rounding in a compiled program; `checkpoints/rounding.py` does it for files."""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float, Int, Key


def round_stochastically(x: Float[Array, "*S"], key: Key[Array, ""]) -> BFloat16[Array, "*S"]:
    """float32 -> bfloat16: to one of the two neighbours, the nearer the more often, so that the
    mean is x.

    A bfloat16 is the upper half of a float32: a random lower half is added before it is cut.
    """
    exact = x.astype(jnp.float32)
    noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    bits = (jax.lax.bitcast_convert_type(exact, jnp.uint32) + noise) >> 16
    rounded = jax.lax.bitcast_convert_type(bits.astype(jnp.uint16), jnp.bfloat16)
    # What is no number has no neighbours.
    return jnp.where(jnp.isfinite(exact), rounded, exact.astype(jnp.bfloat16))


def widened(params: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Parameters in float32."""
    return {path: leaf.astype(jnp.float32) for path, leaf in params.items()}


def narrowed(
    params: Mapping[str, jax.Array],
    before: Mapping[str, jax.Array],
    seed: int,
    step: Int[Array, ""],
) -> dict[str, jax.Array]:
    """float32 parameters in the dtypes that they had before, rounded stochastically.

    The nearest bfloat16 of a weight and its update is mostly the weight as it was.
    """

    def narrow(path: str, leaf: jax.Array) -> jax.Array:
        if before[path].dtype == leaf.dtype:
            return leaf
        return round_stochastically(leaf, rounding_key(seed, step, path))

    return {path: narrow(path, leaf) for path, leaf in params.items()}


def rounding_key(seed: int, step: Int[Array, ""], name: str) -> Key[Array, ""]:
    """A key of its own for every step and every array, whatever the devices."""
    key = jax.random.fold_in(jax.random.key(seed), step)
    return jax.random.fold_in(key, zlib.crc32(name.encode()))
