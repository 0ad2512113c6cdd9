"""Moments of an optimizer in fewer bytes: bfloat16, or 8 bits in blocks with a scale each.

Both are rounded stochastically. A second moment that keeps 0.999 of itself changes by less than
half a step of either per update, and would stand still if it were rounded to the nearest.

8 bits: block-wise quantisation as Dettmers et al. 2022 (arXiv 2110.02861) have it, so that an
outlier spoils the numbers beside it alone. A block is a run of the last dimension, divided by its
largest magnitude; the codes' values lie denser near zero. Where they have a table of values, which
accelerators read slowly, here a code k of n stands for (k / n)^2 in first moments, which have a
sign, and for (k / n)^4 in second ones, which have none and many more orders of magnitude.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key, Shaped, UInt8

from mmpo_jax.models.vocabulary import TABLES
from mmpo_jax.recipes.optimizers import Moments
from mmpo_jax.training.rounding import round_stochastically, rounding_key

BLOCK, SMALLEST_BLOCK = 256, 32
"""Numbers under one scale."""
SMALL = 4096
"""Arrays with fewer numbers are kept whole: what they would save is nothing."""
FIRST, SECOND = "mu", "nu"
"""Moments in the states of optax."""


class Blocks(NamedTuple):
    """An array in 8 bits."""

    codes: Int[Array, "*S W"] | UInt8[Array, "*S W"]
    """int8 with a sign, uint8 without; shaped as the array, so it is split as the array is."""
    scales: Float[Array, "*S N"]
    """The largest magnitude of every block of the last dimension."""


def with_moments_as(
    kind: Moments, inner: optax.GradientTransformation, compress: Callable[[str], bool]
) -> optax.GradientTransformation:
    """The transformation with its moments kept otherwise between updates.

    Args:
      kind: how.
      inner: its state has a `count` and moments by the names above, trees of path -> array.
      compress: whether a parameter's moments are; 8 bits need `SMALL` numbers besides.
    """
    if kind == "float32":
        return inner

    def keep(state: Any) -> Any:
        """The state with narrow moments."""

        def narrow(moment: str) -> Callable[[Any, jax.Array], Any]:
            def of(keys: Any, leaf: jax.Array) -> Any:
                path = keys[-1].key
                if not compress(path):
                    return leaf
                key = rounding_key(0, state.count, f"{moment} {path}")
                if kind == "bfloat16":
                    return round_stochastically(leaf, key)
                if leaf.size < SMALL:
                    return leaf
                return quantized(leaf, key, moment == FIRST, _size_of(path, leaf.shape))

            return of

        return state._replace(
            **{
                moment: jax.tree_util.tree_map_with_path(narrow(moment), getattr(state, moment))
                for moment in (FIRST, SECOND)
                if hasattr(state, moment)
            }
        )

    def widen(state: Any) -> Any:
        def of(keys: Any, leaf: Any) -> jax.Array:
            if not isinstance(leaf, Blocks):
                return leaf.astype(jnp.float32)
            return restored(leaf, _size_of(keys[-1].key, leaf.codes.shape))

        return state._replace(
            **{
                moment: jax.tree_util.tree_map_with_path(
                    of, getattr(state, moment), is_leaf=lambda leaf: isinstance(leaf, Blocks)
                )
                for moment in (FIRST, SECOND)
                if hasattr(state, moment)
            }
        )

    def init(params: Any) -> Any:
        return keep(inner.init(params))

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, after = inner.update(grads, widen(state), params)
        return updates, keep(after)

    return optax.GradientTransformation(init, update)


def quantized(x: Float[Array, "*S W"], key: Key[Array, ""], signed: bool, size: int = 0) -> Blocks:
    """The array in 8 bits, whose mean over all keys is the array.

    A block's largest magnitude and zeros are exact. A second moment that is not zero stays so,
    however small: the update is divided by it. Blocks have `size` numbers, by default as many as
    `block_size` gives their dimension.
    """
    levels, power = _scale_of(signed)
    parts = _in_blocks(x, size)
    scales = jnp.abs(parts).max(axis=-1)
    share = jnp.abs(parts) / jnp.where(scales > 0, scales, 1)[..., None]
    below = jnp.clip(jnp.floor(levels * share ** (1 / power)), 0, levels - 1)
    low, high = (below / levels) ** power, ((below + 1) / levels) ** power
    # Of 256 equally likely numbers between 0 and 1, neither of which is among them.
    chance = (jax.random.bits(key, share.shape, jnp.uint8).astype(jnp.float32) + 0.5) / 256
    codes = below + (chance * (high - low) < share - low)
    if signed:
        codes = (jnp.sign(parts) * codes).astype(jnp.int8)
    else:
        codes = jnp.where(share > 0, jnp.maximum(codes, 1), 0).astype(jnp.uint8)
    return Blocks(_as_it_was(codes, x.shape[-1]), scales)


def restored(blocks: Blocks, size: int = 0) -> Float[Array, "*S W"]:
    """The array that the blocks of `size` numbers stand for, in float32; see `quantized`."""
    levels, power = _scale_of(blocks.codes.dtype == jnp.int8)
    codes = _in_blocks(blocks.codes, size).astype(jnp.float32)
    parts = jnp.sign(codes) * (jnp.abs(codes) / levels) ** power * blocks.scales[..., None]
    return _as_it_was(parts, blocks.codes.shape[-1])


def block_size(width: int) -> int:
    """Numbers in a block of a dimension: `BLOCK`, or fewer where each eighth of the dimension, as
    eight devices would have it, then has whole blocks."""
    size = BLOCK
    while size > SMALLEST_BLOCK and width % (8 * size):
        size //= 2
    return size


def _size_of(path: str, shape: tuple[int, ...]) -> int:
    """Numbers in a block of a parameter's moments. Along a vocabulary, which is another where more
    devices share it, blocks are the same on any mesh."""
    along_tokens = TABLES.get(path) == len(shape) - 1
    return SMALLEST_BLOCK if along_tokens else block_size(shape[-1])


def _scale_of(signed: bool) -> tuple[int, int]:
    """(the highest code, the power that its values follow)."""
    return (127, 2) if signed else (255, 4)


def _in_blocks(x: Shaped[Array, "*S W"], size: int) -> Shaped[Array, "*S N B"]:
    """The last dimension in blocks, the last of them filled with zeros."""
    width = x.shape[-1]
    size = size or block_size(width)
    padded = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -width % size)])
    return padded.reshape(*x.shape[:-1], -1, size)


def _as_it_was(parts: Shaped[Array, "*S N B"], width: int) -> Shaped[Array, "*S W"]:
    return parts.reshape(*parts.shape[:-2], -1)[..., :width]
