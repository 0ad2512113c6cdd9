"""Places that decode samples, one sample after another in each: what a device holds and computes.

B rows have Q prompts and G * M places each. A place decodes samples of its row's prompts. When one
ends, the row's next sample takes the place, within the compiled loop; prompts whose samples are all
there are replaced by the host (see `refill`).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Key

from mmpo_jax.generation.sampler import NOT_FINITE, choose_token
from mmpo_jax.models.attention import cached_attention, in_window, shared_prompt_attention
from mmpo_jax.models.batch import Batch
from mmpo_jax.models.layers import batch_axes
from mmpo_jax.models.log_probs import next_token_logits
from mmpo_jax.models.lora import cast_params
from mmpo_jax.models.model import Model, Params
from mmpo_jax.models.precision import inference_dtype
from mmpo_jax.models.vlm import VisionLanguageModel, prompt_lengths
from mmpo_jax.recipes.sampling import Decoding


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prompts:
    """One prompt for each of B rows, as its samples read it."""

    cache: tuple[jax.Array, jax.Array]
    """Keys and values [L, B, K, P, d]. Heads come first, as attention wants them."""
    length: jax.Array
    """int32[B]; tokens of the prompt."""
    next_position: jax.Array
    """int32[B]; where a sample's first token stands, on all axes."""
    hidden: jax.Array
    """[B, D]; what a sample's first token is drawn from, NaN where the prompt's keys or values are
    not finite."""
    keys: jax.Array
    """PRNG keys [B, n] of the samples."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Samples:
    """Samples of the prompts of B rows, and which of them the places decode."""

    started: jax.Array
    """int32[B]; how many were started, of all prompts that the row has been given."""
    tokens: jax.Array
    """int32[B, Q * n, T]; what is sampled, `pad_id` after the end."""
    done: jax.Array
    """bool[B, Q * n]; which samples have ended; all of a prompt that is not there."""
    sample: jax.Array
    """int32[B, G * M]; which of the row's Q * n samples a place decodes, -1 for none."""
    position: jax.Array
    """int32[B, G * M]; the index of the token that comes next."""
    hidden: jax.Array
    """[B, G * M, D]; what that token is drawn from."""
    steps: jax.Array
    """int32[]; how often all places have decoded a token."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pool:
    """Keys and values of sampled tokens; M places share each of B * G pools of C tokens.

    Every step writes M tokens behind those that are there, so all pools are written at the same
    index, however far each sample is. What a sample wrote is nobody's once it has ended, and goes
    when the pool is full (`compact`).
    """

    cache: tuple[jax.Array, jax.Array]
    """[L, B, G, K, C, d] each."""
    owner: jax.Array
    """int32[B, G, C]; which of the M places reads the token, -1 for none."""
    position: jax.Array
    """int32[B, G, C]; the token's index in its sample."""
    used: jax.Array
    """int32[]; how many of the C are written."""


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


def row_axis(leaf: jax.Array) -> int:
    """Which axis of an array is that of rows: caches alone have five or more, layers in front."""
    return 1 if leaf.ndim > 4 else 0


def placed(tree: Any) -> Any:
    """Keeps rows on the devices of the mesh that batches are split over, if one is in use, and
    key-value heads where the axis `tensor` has them."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return tree

    def place(leaf: jax.Array) -> jax.Array:
        spec: list[Any] = [None] * leaf.ndim
        if leaf.ndim:
            spec[row_axis(leaf)] = batch_axes(mesh)
        if leaf.ndim > 4 and leaf.shape[-3] % mesh.shape.get("tensor", 1) == 0:
            spec[-3] = "tensor" if "tensor" in mesh.axis_names else None
        return jax.lax.with_sharding_constraint(leaf, PartitionSpec(*spec))

    return jax.tree.map(place, tree)


def bind(model: Model, params: Params) -> VisionLanguageModel:
    """The module with parameters all of one dtype, as what loops carry has to be."""
    return model.bind(cast_params(params, inference_dtype(params)))


@functools.partial(jax.jit, static_argnames="model")
def prefill(model: Model, params: Params, batch: Batch, keys: Key[Array, "B n"]) -> Prompts:
    """Runs prompts once.

    Args:
      model: the architecture.
      params: its parameters, cast to their `inference_dtype`.
      batch: the prompts; its responses are not read.
      keys: PRNG keys of the samples, [B, n].
    """
    module = bind(model, params)
    no_responses = jnp.zeros((batch.prompt_ids.shape[0], 0, 0), bool)

    def attend_prompt(query, key, value, window, carry, inputs):
        del inputs
        masks = batch.prompt_mask, no_responses
        out = shared_prompt_attention(query, key, value, *masks, window, module.attention)
        (key, value), whole = only_finite(key, value)
        carry &= (whole | ~batch.prompt_mask).all(axis=1)
        return out, carry, (key.swapaxes(1, 2), value.swapaxes(1, 2))

    x = module.embed_prompt(batch)
    every = jnp.ones(len(x), bool)
    x, whole, cache = module.language_model(x, batch.positions, attend_prompt, carry=every)
    length = prompt_lengths(batch)
    last = jax.vmap(lambda rows, at: rows[at])(x, length - 1)
    last = jnp.where(whole[:, None], last, jnp.nan)
    return placed(Prompts(cache, length, batch.next_position, last, keys))


def only_finite(
    key: Float[Array, "B S K d"], value: Float[Array, "B S K d"]
) -> tuple[tuple[Float[Array, "B S K d"], Float[Array, "B S K d"]], Bool[Array, "B S"]]:
    """((key, value), whether they are finite bool[B, S]), 0 where they are not.

    In a cache that several samples have in sight, NaN spoils all of them: it stays NaN times
    weight 0.
    """
    both = jnp.isfinite(key), jnp.isfinite(value)
    whole = both[0].all(axis=(2, 3)) & both[1].all(axis=(2, 3))
    return (jnp.where(both[0], key, 0), jnp.where(both[1], value, 0)), whole


@functools.partial(jax.jit, static_argnames=("rows", "width", "places", "length", "pad_id"))
def empty_rows(
    like: Prompts, *, rows: int, width: int, places: int, length: int, pad_id: int
) -> tuple[tuple[Prompts, ...], Samples]:
    """Rows without prompts.

    Args:
      like: some prompts, whose shapes but for the number of rows theirs will have.
      rows: B.
      width: Q.
      places: of a row, G * M.
      length: T.
      pad_id: what follows a sample's end.
    """

    def empty(leaf: jax.Array) -> jax.Array:
        shape = list(leaf.shape)
        shape[row_axis(leaf)] = rows
        return jnp.broadcast_to(jnp.zeros_like(leaf, shape=()), shape)

    prompts = tuple(jax.tree.map(empty, like) for _ in range(width))
    samples = width * like.keys.shape[1]
    state = Samples(
        started=jnp.zeros(rows, jnp.int32),
        tokens=jnp.full((rows, samples, length), pad_id, jnp.int32),
        done=jnp.ones((rows, samples), bool),
        sample=jnp.full((rows, places), -1, jnp.int32),
        position=jnp.zeros((rows, places), jnp.int32),
        hidden=jnp.zeros((rows, places, like.hidden.shape[1]), like.hidden.dtype),
        steps=jnp.int32(0),
    )
    return placed((prompts, state))


@functools.partial(jax.jit, static_argnames=("groups", "size"))
def empty_pool(like: Prompts, *, groups: int, size: int) -> Pool:
    """Pools of `size` tokens, `groups` of them for every row of some prompts."""
    depth, rows, heads, _, d = like.cache[0].shape
    cache = jnp.zeros((depth, rows, groups, heads, size, d), like.cache[0].dtype)
    nobody = jnp.full((rows, groups, size), -1, jnp.int32)
    return placed(Pool((cache, cache), nobody, jnp.zeros_like(nobody), jnp.int32(0)))


@functools.partial(jax.jit, static_argnames="pad_id", donate_argnames=("prompts", "samples"))
def give(
    prompts: tuple[Prompts, ...],
    samples: Samples,
    new: Prompts,
    to: Int[Array, "Z F"],
    which: Int[Array, "Z F"],
    pad_id: int,
) -> tuple[tuple[Prompts, ...], Samples]:
    """Gives rows new prompts in the place of some that have no sample left.

    Args:
      prompts, samples: of B rows, in Z shards.
      new: Z * F prompts; each stays in its shard, so that no cache travels.
      to: int32[Z, F], the row of its shard that a prompt goes to; B / Z for none.
      which: int32[Z, F], which of that row's Q prompts it replaces.
      pad_id: what follows a sample's end.
    """
    longest = max(prompts[0].cache[0].shape[3], new.cache[0].shape[3])
    new = _widened(new, longest)
    width, none = len(prompts), len(samples.started) // to.shape[0]
    kept = []
    for number, prompt in enumerate(prompts):
        write = functools.partial(_write, rows=jnp.where(which == number, to, none))
        kept.append(jax.tree.map(write, _widened(prompt, longest), new))
    n = new.keys.shape[1]

    def begin(leaf: jax.Array, value: Any) -> jax.Array:
        """Of the samples of the new prompts; prompts are rows here."""
        by_prompt = leaf.reshape(-1, n, *leaf.shape[2:])
        fresh = jnp.full((to.size, *by_prompt.shape[1:]), value, leaf.dtype)
        rows = jnp.where(to < none, to * width + which, none * width)
        return _write(by_prompt, fresh, rows=rows).reshape(leaf.shape)

    tokens, done = begin(samples.tokens, pad_id), begin(samples.done, False)
    return placed((tuple(kept), dataclasses.replace(samples, tokens=tokens, done=done)))


def _widened(prompts: Prompts, length: int) -> Prompts:
    """With room for so many tokens."""
    padding = length - prompts.cache[0].shape[3]
    key, value = (jnp.pad(x, [(0, 0)] * 3 + [(0, padding), (0, 0)]) for x in prompts.cache)
    return dataclasses.replace(prompts, cache=(key, value))


def _write(leaf: jax.Array, new: jax.Array, *, rows: Int[Array, "Z F"]) -> jax.Array:
    """An array with some of its rows replaced, in every one of Z shards by itself."""
    axis = row_axis(leaf)

    def split(x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:axis], len(rows), -1, *x.shape[axis + 1 :])

    def write(own: jax.Array, new: jax.Array, at: jax.Array) -> jax.Array:
        return own.at[(slice(None),) * axis + (at,)].set(new, mode="drop")

    written = jax.vmap(write, (axis, axis, 0), axis)(split(leaf), split(new), rows)
    return written.reshape(leaf.shape)


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
        hidden, pool = decode_token(module, prompts, samples, pool, token, ended)
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
        hidden = jnp.where(its[..., None], prompt.hidden[:, None], hidden)
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
    samples: Samples,
    pool: Pool,
    token: Int[Array, "B M"],
    ended: Bool[Array, "B M"],
) -> tuple[Float[Array, "B M D"], Pool]:
    """One token of every place through the decoder.

    Args:
      module: the bound model.
      prompts, samples, pool: before this token.
      token: int32[B, G * M].
      ended: bool[B, G * M], samples that have no token behind this one.

    Returns:
      (what the next token is drawn from [B, G * M, D], the pool with this token written). NaN where
      a key or a value is not finite, which the pool holds as 0.
    """
    rows, groups, _ = pool.owner.shape

    def grouped(x: jax.Array) -> jax.Array:
        return x.reshape(rows, groups, -1, *x.shape[2:])

    sample, position = grouped(samples.sample), grouped(samples.position)
    member = jnp.arange(sample.shape[2])
    owner = _append(pool.owner, jnp.where(sample >= 0, member, -1), pool.used)
    written = _append(pool.position, position, pool.used)
    owned = owner[:, :, None] == member[:, None]
    to_own = position[..., None] - written[:, :, None]
    n = prompts[0].keys.shape[1]
    its = [sample // n == which for which in range(len(prompts))]
    first = sum(
        jnp.where(mine, prompt.next_position[:, None, None], 0)
        for mine, prompt in zip(its, prompts, strict=True)
    )
    positions = (first + position).reshape(rows, 1, -1)
    positions = jnp.broadcast_to(
        positions, (rows, module.config.decoder.rope.axes, positions.shape[2])
    )

    def attend_caches(query, key, value, window, carry, inputs):
        layer, caches = inputs
        (key, value), whole = only_finite(key, value)
        own = tuple(
            jax.lax.dynamic_update_slice(
                cache, grouped(new).swapaxes(2, 3)[None], (layer, 0, 0, 0, pool.used, 0)
            )
            for cache, new in zip(carry[0], (key, value), strict=True)
        )
        own_key, own_value = (
            jax.lax.dynamic_index_in_dim(cache, layer, keepdims=False) for cache in own
        )
        parts = [(own_key, own_value, owned & in_window(to_own, window))]
        for mine, prompt, cache in zip(its, prompts, caches, strict=True):
            place, length = jnp.arange(cache[0].shape[2]), prompt.length[:, None, None, None]
            seen = (place < length) & in_window(length + position[..., None] - place, window)
            parts.append((*cache, seen & mine[..., None]))
        out = cached_attention(grouped(query), parts, query.shape[-1] ** -0.5)
        return out.reshape(query.shape), (own, carry[1] & whole), None

    hidden, (cache, whole), _ = module.language_model(
        module.language_model.embed_tokens(token),
        positions,
        attend_caches,
        carry=(pool.cache, jnp.ones(token.shape, bool)),
        layer_inputs=(jnp.arange(len(pool.cache[0])), tuple(prompt.cache for prompt in prompts)),
    )
    released = (owned & grouped(ended)[..., None]).any(axis=2)
    pool = Pool(cache, jnp.where(released, -1, owner), written, pool.used + len(member))
    return jnp.where(whole[..., None], hidden, jnp.nan), pool


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
    padding = size - order.shape[2]

    def gather(x: jax.Array, axis: int) -> jax.Array:
        at = order
        if x.ndim > order.ndim:
            at = order[None, :, :, None, :, None]
        taken = jnp.take_along_axis(x, at, axis=axis)
        return jnp.pad(taken, [(0, padding if a == axis else 0) for a in range(x.ndim)])

    free = jnp.arange(size) >= (~nobody).sum(axis=2, keepdims=True)
    owner = jnp.where(free, -1, gather(pool.owner, 2))
    used = (~nobody).sum(axis=2).max().astype(jnp.int32)
    cache = gather(pool.cache[0], 4), gather(pool.cache[1], 4)
    return placed(Pool(cache, owner, gather(pool.position, 2), used))
