"""Tokens drawn from logits, with a random key for every token of every sample."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from mmpo_jax.recipes.sampling import Decoding

VOCABULARY_BLOCK = 256
"""Tokens that `draw_token` takes together."""
NOT_FINITE = -1
"""In place of a token that no distribution was there for."""


def choose_token(
    logits: Float[Array, "B n V"],
    keys: Key[Array, "B n"],
    position: Int[Array, "B n"],
    decoding: Decoding,
) -> Int[Array, "B n"]:
    """int32[B, n]: tokens from float32 logits [B, n, V].

    Args:
      logits: of the next token of every sample.
      keys: of the samples.
      position: int32[B, n], the tokens' indices, which a key per token is folded from.
      decoding: temperature and truncation.
    """
    if decoding.temperature == 0:
        return most_likely(logits)
    logits = truncate(logits / decoding.temperature, decoding.top_k, decoding.top_p)

    def draw(
        key: Key[Array, ""], position: Int[Array, ""], logits: Float[Array, " V"]
    ) -> Int[Array, ""]:
        return draw_token(jax.random.fold_in(key, position), logits)

    return jax.vmap(jax.vmap(draw))(keys, position, logits).astype(jnp.int32)


def most_likely(logits: Float[Array, "*b V"]) -> Int[Array, "*b"]:
    """int32[...]: the first of the tokens with the largest logit, the last where that is NaN.

    `jnp.argmax` carries index and value through one reduction, which XLA does not vectorise on CPU;
    two plain ones take a third of the time.
    """
    size = logits.shape[-1]
    index = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    highest = logits.max(axis=-1, keepdims=True)
    return jnp.where(logits == highest, index, size - 1).min(axis=-1)


def draw_token(key: Key[Array, ""], logits: Float[Array, " V"]) -> Int[Array, ""]:
    """int[]: an index of `logits` [V], with the probabilities of their softmax.

    A block of the vocabulary is drawn first, then a token in it: some hundred random numbers
    instead of V, which would take longer to make than the logits.
    """
    block_key, token_key = jax.random.split(key)
    size = VOCABULARY_BLOCK
    padding = -logits.shape[0] % size
    blocks = jnp.pad(logits, (0, padding), constant_values=-jnp.inf).reshape(-1, size)
    block = jax.random.categorical(block_key, jax.nn.logsumexp(blocks, axis=-1))
    return block * size + jax.random.categorical(token_key, blocks[block])


def truncate(logits: Float[Array, "*b V"], top_k: int, top_p: float) -> Float[Array, "*b V"]:
    """Keeps the k most likely tokens, then the smallest set of total probability `top_p`.

    The order and the edge cases are transformers': tokens as likely as the k-th all stay, and the
    most likely token always does. [..., V] -> [..., V], -inf elsewhere.
    """
    if top_k:
        kth = jax.lax.top_k(logits, min(top_k, logits.shape[-1]))[0][..., -1:]
        logits = jnp.where(logits < kth, -jnp.inf, logits)
    if top_p < 1:
        ordered = jnp.sort(logits, axis=-1)[..., ::-1]
        probabilities = jax.nn.softmax(ordered, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        smallest = jnp.where(before < top_p, ordered, jnp.inf).min(axis=-1, keepdims=True)
        logits = jnp.where(logits < smallest, -jnp.inf, logits)
    return logits


def choose_each(
    logits: Float[Array, "B n V"],
    keys: Key[Array, "B n"],
    position: Int[Array, "B n"],
    temperature: Float[Array, "B n"],
    top_k: Int[Array, "B n"],
    top_p: Float[Array, "B n"],
    busy: Bool[Array, "B n"],
) -> Int[Array, "B n"]:
    """`choose_token`, every sample by options of its own; what is not busy gets any token.

    Vocabularies are sorted only where a sample truncates them, and random numbers made only where
    one is not greedy.
    """
    greedy = most_likely(logits)
    draws = busy & (temperature > 0)
    truncates = draws & ((top_k > 0) | (top_p < 1))

    def draw(
        key: Key[Array, ""], position: Int[Array, ""], logits: Float[Array, " V"]
    ) -> Int[Array, ""]:
        return draw_token(jax.random.fold_in(key, position), logits)

    def drawn() -> Int[Array, "B n"]:
        scaled = logits / jnp.where(draws, temperature, 1)[..., None]
        kept = jax.lax.cond(
            truncates.any(), lambda: truncate_each(scaled, top_k, top_p), lambda: scaled
        )
        token = jax.vmap(jax.vmap(draw))(keys, position, kept).astype(jnp.int32)
        return jnp.where(draws, token, greedy)

    return jax.lax.cond(draws.any(), drawn, lambda: greedy)


def truncate_each(
    logits: Float[Array, "*b V"], top_k: Int[Array, "*b"], top_p: Float[Array, "*b"]
) -> Float[Array, "*b V"]:
    """`truncate`, every row by a k and a p of its own."""
    last = logits.shape[-1] - 1
    ordered = jnp.sort(logits, axis=-1)[..., ::-1]
    at = jnp.where(top_k > 0, jnp.minimum(top_k - 1, last), last)
    kth = jnp.take_along_axis(ordered, at[..., None], axis=-1)
    ordered = jnp.where(ordered < kth, -jnp.inf, ordered)
    probabilities = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    kept = (before < top_p[..., None]) | (top_p[..., None] >= 1)
    smallest = jnp.where(kept, ordered, jnp.inf).min(axis=-1, keepdims=True)
    return jnp.where(logits < jnp.maximum(kth, smallest), -jnp.inf, logits)


def sample_keys(
    seed: int, round_index: int, prompt_numbers: Any, num_samples: int, repeats: Any = 0
) -> Key[Array, "B n"]:
    """PRNG keys [B, n] folded from (seed, round, prompt, sample); where a prompt comes again, the
    numbers of its samples go on.

    Args:
      seed: of the run.
      round_index: which round samples.
      prompt_numbers: uint32[B], a number for each prompt id (see `prompt_number`).
      num_samples: n.
      repeats: uint32[B], how often the prompt has come before.
    """
    base = jax.random.fold_in(jax.random.key(seed), round_index)
    per_prompt = jax.vmap(lambda number: jax.random.fold_in(base, number))(
        jnp.asarray(prompt_numbers, jnp.uint32)
    )
    first = num_samples * jnp.broadcast_to(jnp.asarray(repeats, jnp.uint32), per_prompt.shape)
    numbers = first[:, None] + jnp.arange(num_samples, dtype=jnp.uint32)
    return jax.vmap(jax.vmap(jax.random.fold_in, in_axes=(None, 0)))(per_prompt, numbers)
