"""What devices hold while samples are drawn: prompts, samples, and the places that decode them.

B rows have Q prompts and G * M places each. A place decodes samples of its row's prompts. When one
ends, the row's next sample takes the place, within the compiled loop (`decoding`); prompts whose
samples are all there are replaced by the host (`refill`).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, PartitionSpec
from jaxtyping import Array, Int, Key

from mmpo_jax.generation.caches import DeltaStates, Kept, KeyValues
from mmpo_jax.models.attention import shared_prompt_attention
from mmpo_jax.models.batch import Batch
from mmpo_jax.models.delta_net import DeltaTokens, shared_prompt_delta
from mmpo_jax.models.layers import batch_axes
from mmpo_jax.models.log_probs import states_at_ends
from mmpo_jax.models.lora import cast_params
from mmpo_jax.models.model import Model, Params
from mmpo_jax.models.precision import inference_dtype
from mmpo_jax.models.vlm import VisionLanguageModel, prompt_lengths


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prompts:
    """One prompt for each of B rows, as its samples read it.

    Samples go on from the prompt, or from E beginnings of answers to it: the first n / E of them
    from the first, and so on. A beginning sees the prompt and not the others.
    """

    cache: dict[str, Kept]
    """By the path of a stack of layers, what they keep of the prompt and its beginnings."""
    length: jax.Array
    """int32[B]; tokens of the prompt."""
    start: jax.Array
    """int32[B, E]; where of the P the beginning stands; E = 0 where samples go on from the
    prompt."""
    begun: jax.Array
    """int32[B, E]; tokens of the beginning."""
    next_position: jax.Array
    """int32[B]; where the first token behind the prompt stands, on all axes."""
    hidden: jax.Array
    """[B, max(1, E), D]; what a sample's first token is drawn from, NaN where keys or values before
    it are not finite."""
    keys: jax.Array
    """PRNG keys [B, n] of the samples."""
    width: int = dataclasses.field(metadata={"static": True})
    """P, tokens that there is room for."""


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
    """What layers keep of sampled tokens; M places share each of B * G pools of C tokens.

    Every step writes M tokens behind those that are there, so all pools are written at the same
    index, however far each sample is. What a sample wrote is nobody's once it has ended, and goes
    when the pool is full (`compact`).
    """

    cache: dict[str, Kept]
    """By the path of a stack of layers, what they keep of these tokens."""
    owner: jax.Array
    """int32[B, G, C]; which of the M places reads the token, -1 for none."""
    position: jax.Array
    """int32[B, G, C]; the token's index in its sample."""
    used: jax.Array
    """int32[]; how many of the C are written."""


def row_axis(leaf: jax.Array) -> int:
    """Which axis of an array is that of rows: caches alone have five or more, layers in front."""
    return 1 if leaf.ndim > 4 else 0


def row_spec(leaf: jax.Array, mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """Where an array of rows lies: rows on the devices that batches are split over, and key-value
    heads where the axis `tensor` has them."""
    spec: list[Any] = [None] * leaf.ndim
    if leaf.ndim:
        spec[row_axis(leaf)] = batch_axes(mesh)
    if leaf.ndim > 4 and "tensor" in mesh.shape and leaf.shape[-3] % mesh.shape["tensor"] == 0:
        spec[-3] = "tensor"
    return PartitionSpec(*spec)


def placed(tree: Any) -> Any:
    """Keeps arrays of rows where `row_spec` says, if a mesh is in use."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return tree
    return jax.tree.map(
        lambda leaf: jax.lax.with_sharding_constraint(leaf, row_spec(leaf, mesh)), tree
    )


def bind(model: Model, params: Params) -> VisionLanguageModel:
    """The module with parameters all of one dtype, as what loops carry has to be."""
    return model.bind(cast_params(params, inference_dtype(params)))


@functools.partial(jax.jit, static_argnames=("model", "begun"))
def prefill(
    model: Model, params: Params, batch: Batch, keys: Key[Array, "B n"], begun: bool = False
) -> Prompts:
    """Runs prompts once.

    Args:
      model: the architecture.
      params: its parameters, cast to their `inference_dtype`.
      batch: the prompts.
      keys: PRNG keys of the samples, [B, n].
      begun: whether samples go on from the batch's responses, which else are not read.
    """
    module = bind(model, params)
    embedded = module.embed_batch(batch, responses=begun)
    rows, size = batch.prompt_ids.shape
    beginnings = batch.response_mask if begun else jnp.zeros((rows, 0, 0), bool)
    real = jnp.concatenate([batch.prompt_mask, beginnings.reshape(rows, -1)], axis=1)

    images = module.shown_images(batch)
    if not begun and images is not None:
        images = dataclasses.replace(images, responses=None)

    def attend_prompt(made, stack, carry, inputs):
        del inputs
        masks = batch.prompt_mask, beginnings
        if isinstance(made, DeltaTokens):
            read, *states = shared_prompt_delta(made, stack.layer.mixer, *masks)
            return read, carry, DeltaStates.of_prompt(*states)
        (query, key, value), scores = made, stack.layer.mixer.scores
        scores |= {"backend": module.attention, "images": images}
        out = shared_prompt_attention(query, key, value, *masks, **scores)
        if stack.layer.mixer.kv_source is not None:
            return out, carry, None
        kept, whole = KeyValues.of_prompt(key, value)
        return out, carry & (whole | ~real).all(axis=1), kept

    every = jnp.ones(rows, bool)
    x, whole, cache = module.language_model(
        embedded.x,
        embedded.positions,
        attend_prompt,
        carry=every,
        added=embedded.added,
        per_layer=embedded.per_layer,
    )
    cache = {path: kept for path, kept in cache.items() if kept is not None}
    length = prompt_lengths(batch)
    last = jax.vmap(lambda rows, at: rows[at])(x, length - 1)
    ends = last[:, None]
    if begun:
        ends = states_at_ends((last, x[:, size:].reshape(*beginnings.shape, -1)), batch)
    ends = jnp.where(whole[:, None, None], ends, jnp.nan)
    count, width = beginnings.shape[1:]
    start = jnp.broadcast_to(size + width * jnp.arange(count), (rows, count))
    tokens = beginnings.sum(axis=2, dtype=jnp.int32)
    start = start.astype(jnp.int32)
    return placed(
        Prompts(cache, length, start, tokens, batch.next_position, ends, keys, real.shape[1])
    )


def beginning_of(sample: Int[Array, "*s"], n: int, count: int) -> Int[Array, "*s"]:
    """Which of `count` beginnings a sample goes on from; `sample` counts those of all prompts of a
    row, n of each."""
    return (sample % n) // (n // count)


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

    prompts = empty_prompts(like, rows=rows, width=width)
    samples = width * like.keys.shape[1]
    state = Samples(
        started=jnp.zeros(rows, jnp.int32),
        tokens=jnp.full((rows, samples, length), pad_id, jnp.int32),
        done=jnp.ones((rows, samples), bool),
        sample=jnp.full((rows, places), -1, jnp.int32),
        position=jnp.zeros((rows, places), jnp.int32),
        hidden=jnp.zeros((rows, places, like.hidden.shape[-1]), like.hidden.dtype),
        steps=jnp.int32(0),
    )
    return placed((prompts, state))


@functools.partial(jax.jit, static_argnames=("rows", "width"))
def empty_prompts(like: Prompts, *, rows: int, width: int) -> tuple[Prompts, ...]:
    """Q = `width` times B = `rows` prompts that are not there, see `empty_rows`."""

    def empty(leaf: jax.Array) -> jax.Array:
        shape = list(leaf.shape)
        shape[row_axis(leaf)] = rows
        return jnp.broadcast_to(jnp.zeros_like(leaf, shape=()), shape)

    return placed(tuple(jax.tree.map(empty, like) for _ in range(width)))


@functools.partial(jax.jit, static_argnames=("groups", "members", "size"))
def empty_pool(like: Prompts, *, groups: int, members: int, size: int) -> Pool:
    """Pools of `size` tokens, `groups` of them for every row of some prompts, for so many places
    each."""
    cache = {path: kept.pool(groups, members, size) for path, kept in like.cache.items()}
    nobody = jnp.full((len(like.length), groups, size), -1, jnp.int32)
    return placed(Pool(cache, nobody, jnp.zeros_like(nobody), jnp.int32(0)))


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
    width, none = len(prompts), len(samples.started) // to.shape[0]
    n = new.keys.shape[1]

    def begin(leaf: jax.Array, value: Any) -> jax.Array:
        """Of the samples of the new prompts; prompts are rows here."""
        by_prompt = leaf.reshape(-1, n, *leaf.shape[2:])
        fresh = jnp.full((to.size, *by_prompt.shape[1:]), value, leaf.dtype)
        rows = jnp.where(to < none, to * width + which, none * width)
        return _write(by_prompt, fresh, rows=rows).reshape(leaf.shape)

    tokens, done = begin(samples.tokens, pad_id), begin(samples.done, False)
    given = replaced(prompts, new, to, which)
    return given, placed(dataclasses.replace(samples, tokens=tokens, done=done))


@functools.partial(jax.jit, donate_argnames="prompts")
def replaced(
    prompts: tuple[Prompts, ...], new: Prompts, to: Int[Array, "Z F"], which: Int[Array, "Z F"]
) -> tuple[Prompts, ...]:
    """The prompts of rows with new ones in the place of some, see `give`; as wide as the widest."""
    longest = max(prompts[0].width, new.width)
    none = len(prompts[0].length) // to.shape[0]
    new, kept = _widened(new, longest), []
    for number, prompt in enumerate(prompts):
        write = functools.partial(_write, rows=jnp.where(which == number, to, none))
        kept.append(jax.tree.map(write, _widened(prompt, longest), new))
    return placed(tuple(kept))


def _widened(prompts: Prompts, length: int) -> Prompts:
    """With room for so many tokens."""
    cache = {path: kept.widened(length) for path, kept in prompts.cache.items()}
    return dataclasses.replace(prompts, cache=cache, width=length)


def _write(leaf: jax.Array, new: jax.Array, *, rows: Int[Array, "Z F"]) -> jax.Array:
    """An array with some of its rows replaced, in every one of Z shards by itself."""
    axis = row_axis(leaf)

    def split(x: jax.Array) -> jax.Array:
        size = x.shape[axis] // len(rows)
        return x.reshape(*x.shape[:axis], len(rows), size, *x.shape[axis + 1 :])

    def write(own: jax.Array, new: jax.Array, at: jax.Array) -> jax.Array:
        return own.at[(slice(None),) * axis + (at,)].set(new, mode="drop")

    written = jax.vmap(write, (axis, axis, 0), axis)(split(leaf), split(new), rows)
    return written.reshape(leaf.shape)
