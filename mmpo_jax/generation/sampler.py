"""n samples per prompt from one prompt cache: prefill once, then a compiled decoding loop."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from mmpo_jax.models.attention import attend, in_window, shared_prompt_attention
from mmpo_jax.models.batch import Batch
from mmpo_jax.models.log_probs import next_token_logits
from mmpo_jax.models.lora import cast_params
from mmpo_jax.models.model import Model, Params
from mmpo_jax.models.precision import inference_dtype
from mmpo_jax.models.vlm import VisionLanguageModel, prompt_lengths, response_positions
from mmpo_jax.recipes.sampling import Decoding

PromptCache = tuple[Float[Array, "L B K P d"], Float[Array, "L B K P d"]]
"""Keys and values of the prompts."""

VOCABULARY_BLOCK = 256
"""Tokens that `draw_token` takes together."""
NOT_FINITE = -1
"""In place of a token that no distribution was there for."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplingState:
    """What the decoding loop carries from one token to the next; n samples of B prompts."""

    position: jax.Array
    """int32[]; the index of the token that comes next."""
    logits: jax.Array
    """float32[B, n, V]; the distribution of that token."""
    tokens: jax.Array
    """int32[B, n, T]; what is sampled so far, `pad_id` after the end."""
    done: jax.Array
    """bool[B, n]; True once EOS is sampled, or nothing can be."""
    cache: tuple[jax.Array, jax.Array]
    """Keys and values of the sampled tokens, [L, B, n, K, T, d] each."""


@functools.partial(jax.jit, static_argnames=("model", "decoding", "eos_ids", "pad_id"))
def sample(
    model: Model,
    params: Params,
    batch: Batch,
    keys: Key[Array, "B n"],
    *,
    decoding: Decoding,
    eos_ids: tuple[int, ...],
    pad_id: int,
) -> Int[Array, "B n T"]:
    """Samples responses to every prompt of a batch.

    Every sample has a key of its own and a key per token is folded from it, so a sample does not
    depend on its neighbours, its place in the batch or the number of samples beside it.

    Args:
      model: the architecture.
      params: its parameters, cast to their `inference_dtype`.
      batch: the prompts; its responses are not read.
      keys: PRNG keys [B, n].
      decoding: temperature, truncation and length.
      eos_ids: tokens that end a response.
      pad_id: what follows the end.

    Returns:
      int32[B, n, max_new_tokens], EOS included where it was sampled. A sample whose logits are NaN
      or infinite ends with `NOT_FINITE`.
    """
    # All of one dtype, as what loops over layers and tokens carries has to be.
    module = model.bind(cast_params(params, inference_dtype(params)))
    prompt_cache, last = prefill(module, batch)
    b, n = batch.prompt_ids.shape[0], decoding.num_samples
    depth, _, k, _, d = prompt_cache[0].shape
    own = jnp.zeros((depth, b, n, k, decoding.max_new_tokens, d), prompt_cache[0].dtype)
    logits = next_token_logits(module, last)
    state = SamplingState(
        position=jnp.int32(0),
        logits=jnp.broadcast_to(logits[:, None], (b, n, logits.shape[-1])),
        tokens=jnp.full((b, n, decoding.max_new_tokens), pad_id, jnp.int32),
        done=jnp.broadcast_to(batch.weights[:, None] == 0, (b, n)),
        cache=(own, own),
    )

    def unfinished(state: SamplingState) -> jax.Array:
        return (state.position < decoding.max_new_tokens) & ~state.done.all()

    def step(state: SamplingState) -> SamplingState:
        token = choose_token(state.logits, keys, state.position, decoding)
        finite = jnp.isfinite(state.logits).all(axis=-1)
        token = jnp.where(state.done, pad_id, jnp.where(finite, token, NOT_FINITE))
        done = state.done | ~finite | jnp.isin(token, jnp.array(eos_ids))
        logits, cache = decode_token(module, batch, prompt_cache, state, token)
        return SamplingState(
            position=state.position + 1,
            logits=logits,
            tokens=state.tokens.at[:, :, state.position].set(token),
            done=done,
            cache=cache,
        )

    return jax.lax.while_loop(unfinished, step, state).tokens


def prefill(module: VisionLanguageModel, batch: Batch) -> tuple[PromptCache, Float[Array, "B D"]]:
    """Runs the prompts once.

    Returns:
      ((keys, values) [L, B, K, P, d] of every layer, last token's hidden state [B, D]). Heads come
      first, as attention wants them: decoding reads the cache as it lies.
    """
    no_responses = jnp.zeros((batch.prompt_ids.shape[0], 0, 0), bool)

    def attend_prompt(query, key, value, window, carry, inputs):
        del inputs
        masks = batch.prompt_mask, no_responses
        out = shared_prompt_attention(query, key, value, *masks, window, module.attention)
        return out, carry, (key.swapaxes(1, 2), value.swapaxes(1, 2))

    x = module.embed_prompt(batch)
    x, _, cache = module.language_model(x, batch.positions, attend_prompt)
    last = jax.vmap(lambda rows, at: rows[at])(x, prompt_lengths(batch) - 1)
    return cache, last


def decode_token(
    module: VisionLanguageModel,
    batch: Batch,
    prompt_cache: PromptCache,
    state: SamplingState,
    token: Int[Array, "B n"],
) -> tuple[Float[Array, "B n V"], tuple[Float[Array, "L B n K T d"], Float[Array, "L B n K T d"]]]:
    """One token of every sample through the decoder.

    Args:
      module: the bound model.
      batch: the prompts.
      prompt_cache: see `prefill`.
      state: the loop's state before this token.
      token: int32[B, n].

    Returns:
      (logits of the next token float32[B, n, V], the samples' cache with this token written).
    """
    n = token.shape[1]
    at = state.position
    # The n samples of a prompt are n rows of the decoder's sequence axis: they share its cache.
    x = module.language_model.embed_tokens(token)
    positions = response_positions(batch, jnp.broadcast_to(at, n))
    prompt_steps = jnp.arange(batch.prompt_ids.shape[1])
    to_prompt = (prompt_lengths(batch) + at)[:, None, None, None] - prompt_steps
    to_own = at - jnp.arange(state.tokens.shape[-1])

    def attend_caches(query, key, value, window, carry, inputs):
        layer, prompt_key, prompt_value = inputs
        caches = tuple(
            jax.lax.dynamic_update_slice(cache, new[None, :, :, :, None], (layer, 0, 0, 0, at, 0))
            for cache, new in zip(carry, (key, value), strict=True)
        )
        own_key, own_value = (
            jax.lax.dynamic_index_in_dim(cache, layer, keepdims=False).swapaxes(2, 3)
            for cache in caches
        )
        prompt = prompt_key.swapaxes(1, 2), prompt_value.swapaxes(1, 2)
        parts = [
            (*prompt, batch.prompt_mask[:, None, None, :] & in_window(to_prompt, window)),
            (own_key, own_value, in_window(to_own, window)),
        ]
        out = attend(query[:, :, None], parts, query.shape[-1] ** -0.5)
        return out[:, :, 0], caches, None

    layers = jnp.arange(prompt_cache[0].shape[0])
    hidden, cache, _ = module.language_model(
        x, positions, attend_caches, carry=state.cache, layer_inputs=(layers, *prompt_cache)
    )
    return next_token_logits(module, hidden), cache


def choose_token(
    logits: Float[Array, "B n V"],
    keys: Key[Array, "B n"],
    position: Int[Array, ""],
    decoding: Decoding,
) -> Int[Array, "B n"]:
    """int32[B, n]: the next token of every sample from float32 logits [B, n, V]."""
    if decoding.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = truncate(logits / decoding.temperature, decoding.top_k, decoding.top_p)

    def draw(key: Key[Array, ""], logits: Float[Array, " V"]) -> Int[Array, ""]:
        return draw_token(jax.random.fold_in(key, position), logits)

    return jax.vmap(jax.vmap(draw))(keys, logits).astype(jnp.int32)


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
