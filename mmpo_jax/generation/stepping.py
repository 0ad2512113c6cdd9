"""The compiled loop of a server: a few tokens of every place, each with options of its own.

Who is served comes and goes while others are decoded, so what a place decodes, how it samples and
when it ends are data that the host (`engine`) gives anew at every call. Prompts, pools and the pass
through the decoder are those of `decoding`, whose options are compiled in.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, UInt

from mmpo_jax.generation.decoding import decode_token
from mmpo_jax.generation.places import Pool, Prompts, bind, placed
from mmpo_jax.generation.sampler import NOT_FINITE, choose_each
from mmpo_jax.models.head import next_token_logits
from mmpo_jax.models.model import Model, Params

NO_TOKEN = -2
"""In place of a token where a place had no sample."""
TOP = 20
"""Most likely tokens that are told at most, as OpenAI's protocol has it."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Places:
    """What every one of B * M places decodes, arrays [B, M] of the host."""

    prompt: Any
    """int32; which of its row's Q prompts it goes on from, -1 for none."""
    position: Any
    """int32; tokens that it has sampled."""
    limit: Any
    """int32; tokens after which it ends."""
    temperature: Any
    """float32; 0 is greedy."""
    top_k: Any
    """int32; 0 keeps all tokens."""
    top_p: Any
    """float32; 1 keeps all tokens."""
    seed: Any
    """uint32[B, M, 2]; the lower and the higher half of the request's seed."""
    number: Any
    """uint32; number of the sample among those of its request."""
    tells_top: Any
    """bool; whether the most likely tokens are told."""
    begins: Any
    """bool; whether it begins, from the end of the prompt."""
    dropped: Any
    """bool; whether what it has in the pool is nobody's any more."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Said:
    """What places sampled in up to N steps."""

    tokens: jax.Array
    """int32[N, B, M]; `NO_TOKEN` where there is none, `NOT_FINITE` where no distribution was."""
    log_probs: jax.Array
    """float32[N, B, M]; of the tokens under the model, before temperature and truncation."""
    top_ids: jax.Array
    """int32[N, B, M, 20]; the most likely tokens, where they are told."""
    top_log_probs: jax.Array
    """float32[N, B, M, 20]; of these."""
    live: jax.Array
    """int32[]; the most tokens of a pool that places read."""
    used: jax.Array
    """int32[]; how many tokens of the pools are written."""


@functools.partial(
    jax.jit,
    static_argnames=("model", "steps", "eos_ids", "pad_id"),
    donate_argnames=("hidden", "pool"),
)
def decode_steps(
    model: Model,
    params: Params,
    prompts: tuple[Prompts, ...],
    hidden: Float[Array, "B M D"],
    pool: Pool,
    places: Places,
    waits: Bool[Array, ""],
    *,
    steps: int,
    eos_ids: tuple[int, ...],
    pad_id: int,
) -> tuple[Float[Array, "B M D"], Pool, Said]:
    """Decodes up to `steps` tokens of every place.

    It ends before that where no place has a sample left, where the pool is full, and where somebody
    waits and a place has become free.

    Args:
      model: the architecture.
      params: its parameters, cast to their `inference_dtype`.
      prompts: Q for each of B rows, each with one key, which nobody reads.
      hidden: [B, M, D], what the next token of every place is drawn from.
      pool: keys and values of the tokens of all places.
      places: what they decode.
      waits: bool[], whether somebody waits for a place.
      steps: N.
      eos_ids: tokens that end a sample.
      pad_id: what places without a sample read.

    Returns:
      (hidden, pool, what was said).
    """
    module = bind(model, params)
    hidden, pool = _begun(prompts, hidden, pool, places)
    keys = _keys(places)
    shape = steps, *places.prompt.shape
    empty = (
        jnp.full(shape, NO_TOKEN, jnp.int32),
        jnp.zeros(shape, jnp.float32),
        jnp.zeros((*shape, TOP), jnp.int32),
        jnp.zeros((*shape, TOP), jnp.float32),
    )

    def goes_on(state: Any) -> jax.Array:
        step, sample, _, _, pool, _ = state
        freed = ((sample < 0) & (places.prompt >= 0)).any()
        room = pool.used + shape[2] // pool.owner.shape[1] <= pool.owner.shape[2]
        return (step < steps) & (sample >= 0).any() & room & ~(waits & freed)

    def take(state: Any) -> Any:
        step, sample, position, hidden, pool, said = state
        busy = sample >= 0
        logits = next_token_logits(module, hidden)
        token = choose_each(
            logits, keys, position, places.temperature, places.top_k, places.top_p, busy
        )
        finite = jnp.isfinite(logits).all(axis=-1)
        told = jnp.where(busy, jnp.where(finite, token, NOT_FINITE), NO_TOKEN)
        said = tuple(
            jax.lax.dynamic_update_index_in_dim(all_steps, new.astype(all_steps.dtype), step, 0)
            for all_steps, new in zip(
                said, (told, *_log_probs(logits, token, busy & places.tells_top)), strict=True
            )
        )
        last = position + 1 >= places.limit
        ended = busy & (~finite | jnp.isin(token, jnp.array(eos_ids, jnp.int32)) | last)
        token = jnp.where(busy & finite, token, pad_id)
        hidden, pool = decode_token(module, prompts, sample, position, pool, token, ended)
        return step + 1, jnp.where(ended, -1, sample), position + 1, hidden, pool, said

    state = jnp.int32(0), jnp.asarray(places.prompt), jnp.asarray(places.position)
    _, _, _, hidden, pool, said = jax.lax.while_loop(
        goes_on, take, placed((*state, hidden, pool, empty))
    )
    live = (pool.owner >= 0).sum(axis=2).max().astype(jnp.int32)
    # A copy: the pool's own is given away with the pool.
    tokens, log_probs, top_ids, top_log_probs = said
    return (
        hidden,
        pool,
        Said(tokens, log_probs, top_ids, top_log_probs, live, pool.used + 0),
    )


def _begun(
    prompts: tuple[Prompts, ...], hidden: jax.Array, pool: Pool, places: Places
) -> tuple[jax.Array, Pool]:
    """Places that begin read the ends of their prompts; what dropped ones wrote is nobody's."""
    for which, prompt in enumerate(prompts):
        its = places.begins & (places.prompt == which)
        hidden = jnp.where(its[..., None], prompt.hidden[:, :1], hidden)
    rows, groups, _ = pool.owner.shape
    dropped = jnp.asarray(places.dropped).reshape(rows, groups, -1)
    gone = dropped[..., None] & (pool.owner[:, :, None] == jnp.arange(dropped.shape[2])[:, None])
    return hidden, dataclasses.replace(pool, owner=jnp.where(gone.any(axis=2), -1, pool.owner))


def _keys(places: Places) -> Key[Array, "B M"]:
    """PRNG keys of the samples, folded from seed and number: whatever else is decoded."""

    def key(seed: UInt[Array, " 2"], number: UInt[Array, ""]) -> Key[Array, ""]:
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed[0]), seed[1]), number)

    return jax.vmap(jax.vmap(key))(jnp.asarray(places.seed), jnp.asarray(places.number))


def _log_probs(
    logits: Float[Array, "B M V"], token: Int[Array, "B M"], tells: Bool[Array, "B M"]
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(log-probs of tokens [B, M], the most likely tokens and their log-probs [B, M, 20])."""
    total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    own = jnp.take_along_axis(logits, token[..., None], axis=-1) - total
    count = min(TOP, logits.shape[-1])

    def top() -> tuple[jax.Array, jax.Array]:
        values, ids = jax.lax.top_k(logits, count)
        padding = [(0, 0), (0, 0), (0, TOP - count)]
        return jnp.pad(values - total, padding), jnp.pad(ids, padding, constant_values=-1)

    def none() -> tuple[jax.Array, jax.Array]:
        shape = (*token.shape, TOP)
        return jnp.zeros(shape, logits.dtype), jnp.full(shape, -1, jnp.int32)

    values, ids = jax.lax.cond(tells.any(), top, none)
    return own[..., 0], ids, values
