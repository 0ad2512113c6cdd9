"""The gated delta rule, in chunks and token by token, and the short convolution before it.

Linear attention whose state S, a matrix per head, decays and is corrected by every token
(Yang et al. 2024, arXiv 2412.06464, eq. 10), with a decay a in (0, 1] and a strength b in (0, 1):

    S = a S + b k (v - (a S)^T k)^T,    out = S^T q

A state is the beginning of what comes behind it, so one that a prompt has left is the beginning of
each of its responses. Tokens with `log_decay` 0 and `strength` 0 leave it as it is: padding.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mmpo_jax.models.layers import promote

CHUNK = 64
"""Tokens that are computed together; between two chunks there is a state."""
SMALL_BLOCK = 16
"""Of the matrices that `unit_lower_inverse` inverts, what is not halved further."""
EPSILON = 1e-6
"""Of `unit`, as published."""


def gated_delta_rule(
    query: Float[Array, "B S K e"],
    key: Float[Array, "B S K e"],
    value: Float[Array, "B S H f"],
    log_decay: Float[Array, "B S H"],
    strength: Float[Array, "B S H"],
    state: Float[Array, "B H e f"],
) -> tuple[Float[Array, "B S H f"], Float[Array, "B H e f"]]:
    """The outputs of a row of tokens, and the state behind them.

    Within a chunk all tokens are computed at once, by products of matrices (the paper's section
    3.3); the backward pass computes chunks again, and keeps the states between them alone.

    Args:
      query, key: [B, S, K, e]; every head of theirs is that of H / K consecutive ones of values.
        Keys have length 1 at most.
      value: [B, S, H, f].
      log_decay: [B, S, H], 0 at most.
      strength: [B, S, H], from 0 to 1.
      state: [B, H, e, f], in front of the first token.

    Returns:
      ([B, S, H, f], [B, H, e, f]), of at least float32, in which all is computed.
    """
    arrays = (promote(x) for x in (query, key, value, log_decay, strength, state))
    with jax.default_matmul_precision("highest"):
        return _in_chunks(*arrays)


def _in_chunks(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    log_decay: jax.Array,
    strength: jax.Array,
    state: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    (b, s, k, e), (h, f) = key.shape, value.shape[2:]
    size = min(CHUNK, 1 << (s - 1).bit_length())
    padding = -s % size

    def arrange(x: jax.Array) -> jax.Array:
        """[B, S, heads, d] -> [chunks, B, K, heads / K, C, d]."""
        x = jnp.pad(x, [(0, 0), (0, padding), (0, 0), (0, 0)])
        x = x.reshape(b, -1, size, k, x.shape[2] // k, x.shape[3])
        return x.transpose(1, 0, 3, 4, 2, 5)

    heads = query * e**-0.5, key, value, log_decay[..., None], strength[..., None]
    state = state.reshape(b, k, h // k, e, f)
    state, out = jax.lax.scan(_chunk, state, tuple(map(arrange, heads)))
    out = out.transpose(1, 0, 4, 2, 3, 5).reshape(b, -1, h, f)
    return out[:, :s], state.reshape(b, h, e, f)


@functools.partial(jax.checkpoint, prevent_cse=False)
def _chunk(
    state: Float[Array, "B K r e f"], tokens: tuple[Float[Array, "B K #r C _"], ...]
) -> tuple[Float[Array, "B K r e f"], Float[Array, "B K r C f"]]:
    """(the state behind a chunk, what its tokens read).

    All of a chunk is computed in its turn, also what does not depend on the state: what lies
    between the products stays in a cache (or a TPU's VMEM), where that of all chunks would not.
    """
    query, key, value, log_decay, strength = tokens
    size = key.shape[-2]
    # Summed over what lies between two tokens, and not as a difference of two sums from the start:
    # the decays may add up to thousands, beside which float32 has no digits for the small ones.
    seen, before = np.tri(size, dtype=bool), np.tri(size, k=-1, dtype=bool)
    ones = seen.astype(value.dtype)
    between = jnp.matmul(ones, jnp.where(before, log_decay, 0))
    passed = jnp.exp(jnp.where(seen, between, -jnp.inf))
    from_start, to_end = jnp.exp(jnp.matmul(ones, log_decay)), passed[..., -1, :, None]

    corrects = jnp.where(before, strength * passed * jnp.matmul(key, key.mT), 0)
    missing = strength * (value - from_start * jnp.matmul(key, state))
    new = jnp.matmul(unit_lower_inverse(corrects), missing)
    out = from_start * jnp.matmul(query, state)
    out += jnp.matmul(passed * jnp.matmul(query, key.mT), new)
    return from_start[..., -1:, :] * state + jnp.matmul((to_end * key).mT, new), out


@jax.custom_vjp
def unit_lower_inverse(lower: Float[Array, "*b C C"]) -> Float[Array, "*b C C"]:
    """The inverse of 1 + `lower`, which is zero on and above its diagonal; C is a power of two.

    Halves are inverted by themselves, and small blocks by products of whole matrices, where
    substitution would go row by row.
    """
    half = lower.shape[-1] // 2
    if half < SMALL_BLOCK:
        return _small_inverse(lower)
    blocks = jnp.stack([lower[..., :half, :half], lower[..., half:, half:]])
    first, second = unit_lower_inverse(blocks)
    corner = -jnp.matmul(jnp.matmul(second, lower[..., half:, :half]), first)
    return jnp.block([[first, jnp.zeros_like(first)], [corner, second]])


def _small_inverse(lower: Float[Array, "*b C C"]) -> Float[Array, "*b C C"]:
    """From the inverses of two neighbouring blocks on the diagonal to that of both."""
    size = lower.shape[-1]
    inverse = jnp.broadcast_to(jnp.eye(size, dtype=lower.dtype), lower.shape)
    for width in (1 << power for power in range(size.bit_length() - 1)):
        block = np.arange(size) // width
        joins = (block[:, None] % 2 == 1) & (block == block[:, None] - 1)
        joined = jnp.where(joins, lower, 0)
        inverse -= jnp.matmul(jnp.matmul(inverse, joined), inverse) if width > 1 else joined
    return inverse


def _inverted(lower: jax.Array) -> tuple[jax.Array, jax.Array]:
    inverse = unit_lower_inverse(lower)
    return inverse, inverse


def _by_inverse(inverse: jax.Array, gradient: jax.Array) -> tuple[jax.Array]:
    with jax.default_matmul_precision("highest"):
        return (-jnp.matmul(jnp.matmul(inverse.mT, gradient), inverse.mT),)


unit_lower_inverse.defvjp(_inverted, _by_inverse)


def delta_step(
    query: Float[Array, "*b K e"],
    key: Float[Array, "*b K e"],
    value: Float[Array, "*b H f"],
    log_decay: Float[Array, "*b H"],
    strength: Float[Array, "*b H"],
    state: Float[Array, "*b H e f"],
) -> tuple[Float[Array, "*b H f"], Float[Array, "*b H e f"]]:
    """`gated_delta_rule` of one token: what decoding does."""
    query, key, value, log_decay, strength, state = (
        promote(x) for x in (query, key, value, log_decay, strength, state)
    )
    e, repeats = key.shape[-1], value.shape[-2] // key.shape[-2]
    query, key = (jnp.repeat(x, repeats, axis=-2) for x in (query * e**-0.5, key))
    state = state * jnp.exp(log_decay)[..., None, None]
    with jax.default_matmul_precision("highest"):
        predicted = jnp.einsum("...e,...ef->...f", key, state)
        new = strength[..., None] * (value - predicted)
        state = state + key[..., None] * new[..., None, :]
        return jnp.einsum("...e,...ef->...f", query, state), state


def unit(x: Float[Array, "*b e"]) -> Float[Array, "*b e"]:
    """Vectors of length 1, but for very short ones, in float32 at least."""
    x = promote(x)
    return x * jax.lax.rsqrt((x * x).sum(axis=-1, keepdims=True) + EPSILON)


def causal_conv(
    x: Float[Array, "B S c"], kernel: Float[Array, "w c"], earlier: Float[Array, "B v c"]
) -> Float[Array, "B S c"]:
    """Every channel as a sum of its last w = v + 1 tokens, in float32 at least.

    Args:
      x: [B, S, c].
      kernel: [w, c], the factors of a channel's tokens, the latest last.
      earlier: [B, v, c], the tokens in front of the first.
    """
    x, kernel, earlier = promote(x), promote(kernel), promote(earlier)
    size, tokens = x.shape[1], jnp.concatenate([earlier, x], axis=1)
    return sum(
        (tokens[:, at : at + size] * kernel[at] for at in range(len(kernel))),
        start=jnp.zeros((), x.dtype),
    )


def last_tokens(
    x: Float[Array, "B S c"], earlier: Float[Array, "B v c"], length: Int[Array, " B"]
) -> Float[Array, "B v c"]:
    """What `causal_conv` has to know behind the first `length` tokens of every row.

    Args:
      x: [B, S, c].
      earlier: [B, v, c], in front of them.
      length: int32[B].
    """
    tokens, width = jnp.concatenate([earlier.astype(x.dtype), x], axis=1), earlier.shape[1]
    return jax.vmap(lambda row, at: jax.lax.dynamic_slice_in_dim(row, at, width))(tokens, length)
