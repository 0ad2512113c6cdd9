"""The compiled loop: a token of every place at a time, the next sample where one has ended."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mmpo_jax.generation.caches import PromptSeen, Step, chosen
from mmpo_jax.generation.places import (
    Pool,
    Prompts,
    Samples,
    beginning_of,
    bind,
    placed,
)
from mmpo_jax.generation.sampler import NOT_FINITE, choose_token
from mmpo_jax.models.head import next_token_logits
from mmpo_jax.models.model import Model, Params
from mmpo_jax.models.vlm import VisionLanguageModel
from mmpo_jax.recipes.sampling import Decoding


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Report:
    """What the host decides by."""

    complete: jax.Array
    """bool[B, Q]; prompts that have no sample left, or are not there."""
    live: jax.Array
    """int32[]; the most tokens of a pool that places read."""
    used: jax.Array
    """int32[]; how many tokens of the pools are written."""


@functools.partial(
    jax.jit,
    static_argnames=("model", "decoding", "eos_ids", "pad_id"),
    donate_argnames=("samples", "pool"),
)
def decode(
    model: Model,
    params: Params,
    prompts: tuple[Prompts, ...],
    samples: Samples,
    pool: Pool,
    given: Int[Array, " B"],
    wanted: Int[Array, " Z"],
    *,
    decoding: Decoding,
    eos_ids: tuple[int, ...],
    pad_id: int,
) -> tuple[Samples, Pool, Report]:
    """Decodes until the host has something to do.

    That is: no sample is left, the pool is full, or enough rows of every shard can be given a
    prompt. A place whose sample ends takes its row's next one; they are started in the order in
    which the prompts were given.

    Args:
      model: the architecture.
      params: its parameters, cast to their `inference_dtype`.
      prompts, samples, pool: of B rows.
      given: int32[B], how many prompts the row has been given; the k-th is its prompt k modulo Q.
      wanted: int32[Z], how many rows of every shard have to be free.
      decoding: temperature, truncation and length.
      eos_ids: tokens that end a sample.
      pad_id: what places without a sample read.
    """
    module = bind(model, params)
    width, (rows, count) = len(prompts), samples.done.shape
    n = count // width
    keys = jnp.concatenate([prompt.keys for prompt in prompts], axis=1)
    members = samples.sample.shape[1] // pool.owner.shape[1]

    def goes_on(state: tuple[Samples, Pool]) -> jax.Array:
        samples, pool = state
        work = (samples.sample >= 0).any() | (samples.started < given * n).any()
        complete = samples.done.reshape(rows, width, n).all(axis=2)
        free = jnp.take_along_axis(complete, given[:, None] % width, axis=1)
        enough = (free.reshape(len(wanted), -1).sum(axis=1) >= wanted).all()
        return work & ~enough & (pool.used + members <= pool.owner.shape[2])

    def step(state: tuple[Samples, Pool]) -> tuple[Samples, Pool]:
        samples, pool = state
        samples = _start(prompts, samples, given)
        logits = next_token_logits(module, samples.hidden)
        own = jax.vmap(lambda keys, at: keys[at])(keys, samples.sample)
        token = choose_token(logits, own, samples.position, decoding)
        finite, busy = jnp.isfinite(logits).all(axis=-1), samples.sample >= 0
        last = samples.position + 1 == decoding.max_new_tokens
        ended = busy & (~finite | jnp.isin(token, jnp.array(eos_ids, jnp.int32)) | last)
        said = jnp.where(finite, token, NOT_FINITE)
        tokens = _at_sample(samples.tokens, busy, samples, said)
        done = _at_sample(samples.done, ended, samples)
        token = jnp.where(busy & finite, token, pad_id)
        hidden, pool = decode_token(
            module, prompts, samples.sample, samples.position, pool, token, ended
        )
        samples = dataclasses.replace(
            samples,
            tokens=tokens,
            done=done,
            sample=jnp.where(ended, -1, samples.sample),
            position=samples.position + 1,
            hidden=hidden,
            steps=samples.steps + 1,
        )
        return samples, pool

    samples, pool = placed(jax.lax.while_loop(goes_on, step, (samples, pool)))
    complete = samples.done.reshape(rows, width, n).all(axis=2)
    live = (pool.owner >= 0).sum(axis=2).max()
    # A copy: the pool's own is given away with the pool.
    return samples, pool, Report(complete, live, pool.used + 0)


def _at_sample(
    leaf: jax.Array, chosen: Bool[Array, "B M"], samples: Samples, token: Any = None
) -> jax.Array:
    """Tokens int32[B, Q * n, T] with those of chosen places added, or samples marked as True."""
    column = jnp.where(chosen, samples.sample, leaf.shape[1])
    if token is None:
        return jax.vmap(lambda x, at: x.at[at].set(True, mode="drop"))(leaf, column)
    write = jax.vmap(lambda x, at, time, new: x.at[at, time].set(new, mode="drop"))
    return write(leaf, column, samples.position, token)


def _start(prompts: tuple[Prompts, ...], samples: Samples, given: Int[Array, " B"]) -> Samples:
    """Places that have no sample take the next ones of their rows."""
    width, n = len(prompts), prompts[0].keys.shape[1]
    free = samples.sample < 0
    number = samples.started[:, None] + jnp.cumsum(free, axis=1) - 1
    begins = free & (number < (given * n)[:, None])
    sample = jnp.where(begins, number % (width * n), samples.sample)
    hidden = samples.hidden
    for which, prompt in enumerate(prompts):
        its = begins & (sample // n == which)
        begun = beginning_of(sample, n, prompt.hidden.shape[1])
        first = jnp.take_along_axis(prompt.hidden, begun[..., None], axis=1)
        hidden = jnp.where(its[..., None], first, hidden)
    return dataclasses.replace(
        samples,
        started=samples.started + begins.sum(axis=1, dtype=jnp.int32),
        sample=sample,
        position=jnp.where(begins, 0, samples.position),
        hidden=hidden,
    )


def decode_token(
    module: VisionLanguageModel,
    prompts: tuple[Prompts, ...],
    sample: Int[Array, "B M"],
    position: Int[Array, "B M"],
    pool: Pool,
    token: Int[Array, "B M"],
    ended: Bool[Array, "B M"],
) -> tuple[Float[Array, "B M D"], Pool]:
    """One token of every place through the decoder.

    Args:
      module: the bound model.
      prompts, pool: before this token.
      sample, position: int32[B, G * M], what every place decodes and where the token stands in it,
        see `Samples`.
      token: int32[B, G * M].
      ended: bool[B, G * M], samples that have no token behind this one.

    Returns:
      (what the next token is drawn from [B, G * M, D], the pool with this token written). NaN where
      a key or a value is not finite, which the pool holds as 0.
    """
    rows, groups, _ = pool.owner.shape

    def grouped(x: jax.Array) -> jax.Array:
        return x.reshape(rows, groups, -1, *x.shape[2:])

    sample, position = grouped(sample), grouped(position)
    member = jnp.arange(sample.shape[2])
    owner = _append(pool.owner, jnp.where(sample >= 0, member, -1), pool.used)
    written = _append(pool.position, position, pool.used)
    owned = owner[:, :, None] == member[:, None]
    n = prompts[0].keys.shape[1]
    seen = tuple(
        PromptSeen(
            sample // n == which,
            prompt.length,
            *_begun(prompt, sample),
            bool(prompt.begun.size),
            (sample // n == which).any() if len(prompts) > 1 else None,
        )
        for which, prompt in enumerate(prompts)
    )
    step = Step(position, owned, written, pool.used, seen)
    first = sum(
        jnp.where(of.mine, prompt.next_position[:, None, None] + of.begun, 0)
        for of, prompt in zip(seen, prompts, strict=True)
    )
    positions = (first + position).reshape(rows, 1, -1)
    axes = module.config.decoder.position_axes
    positions = jnp.broadcast_to(positions, (rows, axes, positions.shape[2]))

    def attend_caches(made, stack, carry, layer):
        cache, finite = carry
        path = decoder.kv_source(stack).path
        mixer, own = stack.layer.mixer, cache[path]
        kept = [prompt.cache[path] for prompt in prompts]
        if path != stack.path:
            return own.read(made[0], mixer, step, jnp.int32(0), kept), carry, None
        out, own, whole = own.advance(made, mixer, step, layer, kept)
        return out, (cache | {path: own}, finite & whole), None

    decoder = module.config.decoder
    x, stacks = module.language_model.embed(token), decoder.stacks
    hidden, (cache, whole), _ = module.language_model(
        x,
        positions,
        attend_caches,
        carry=(pool.cache, jnp.ones(token.shape, bool)),
        layer_inputs={stack.path: jnp.arange(len(stack.numbers)) for stack in stacks},
        per_layer=module.language_model.per_layer_inputs(token, x, split=False),
        split=False,  # places are few
        in_place=True,
    )
    released = (owned & grouped(ended)[..., None]).any(axis=2)
    pool = Pool(cache, jnp.where(released, -1, owner), written, pool.used + len(member))
    return jnp.where(whole[..., None], hidden, jnp.nan), pool


def _begun(
    prompt: Prompts, sample: Int[Array, "B G M"]
) -> tuple[Int[Array, "B G M"], Int[Array, "B G M"], Int[Array, "B G M"]]:
    """(where in the cache the beginning of every place's sample stands, its tokens, its number); 0
    where samples go on from the prompt."""
    count = prompt.begun.shape[1]
    if not count:
        return (jnp.zeros_like(sample),) * 3
    which = beginning_of(sample, prompt.keys.shape[1], count)
    take = jax.vmap(lambda of_row, at: of_row[at])
    return take(prompt.start, which), take(prompt.begun, which), which


def _append(
    x: Int[Array, "B G C"], new: Int[Array, "B G M"], used: Int[Array, ""]
) -> Int[Array, "B G C"]:
    return jax.lax.dynamic_update_slice(x, new.astype(x.dtype), (0, 0, used))


@functools.partial(jax.jit, static_argnames="size")
def compact(pool: Pool, *, size: int) -> Pool:
    """The pool with `size` tokens, of which those that are nobody's are free; at least the live
    ones have to go in."""
    nobody = pool.owner < 0
    order = jnp.argsort(nobody, axis=2, stable=True)[:, :, :size]
    free = jnp.arange(size) >= (~nobody).sum(axis=2, keepdims=True)
    owner = jnp.where(free, -1, chosen(pool.owner, order, size, 2))
    used = (~nobody).sum(axis=2).max().astype(jnp.int32)
    cache = {path: kept.compacted(order, size) for path, kept in pool.cache.items()}
    return placed(Pool(cache, owner, chosen(pool.position, order, size, 2), used))
