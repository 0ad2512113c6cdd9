"""Attention over one prompt and many responses, and over caches of it.

Queries, keys and values are grouped: H query heads share K key-value heads, H a multiple of K.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float

from mmpo_jax.models import cudnn, splash
from mmpo_jax.models.layers import ATTENDED
from mmpo_jax.models.sight import Images, in_window, same_image

log = logging.getLogger(__name__)

BACKENDS = ("auto", "xla", "splash", "cudnn")
"""What computes `shared_prompt_attention`; "auto" takes the platform's own."""
PLATFORM_BACKENDS = {"tpu": "splash", "gpu": "cudnn"}

KeyValues = tuple[Float[Array, "... K d"], Float[Array, "... K d"], Bool[Array, "..."] | None]
"""(key, value, mask): see `attend`."""

MIN_QUERY_BLOCK = 128
MAX_QUERY_BLOCKS = 8


def attend(
    query: Float[Array, "B R T H d"],
    parts: Sequence[KeyValues],
    scale: float,
    softcap: float | None = None,
) -> Float[Array, "B R T H d"]:
    """Softmax attention of queries over several key-value parts at once.

    Each part is scored by itself and the softmax runs over all of them, so keys shared by many
    queries (a prompt's) are never repeated or concatenated in memory. Scores are not kept for the
    backward pass but computed again.

    Args:
      query: [B, R, T, H, d], R groups of T queries.
      parts: (key, value, mask) each. A part shared by all groups has key and value [B, S, K, d] and
        a mask that broadcasts to [B, R, T, S]; a part of each group's own has [B, R, S, K, d].
        Masks are bool, True where a query sees a key; None where it sees all.
      scale: factor of the scores, usually 1/sqrt(d).
      softcap: what scores are kept below, see `capped`.

    Returns:
      [B, R, T, H, d] in the query's dtype. A query that sees no key gets a finite value.
    """
    return checkpoint_name(_attend(query, parts, scale, softcap), ATTENDED)


def capped(scores: Float[Array, "*b"], softcap: float | None) -> Float[Array, "*b"]:
    """c tanh(scores / c) (Gemma 2, arXiv 2408.00118, section 2); as they are without a c."""
    return scores if softcap is None else softcap * jnp.tanh(scores / softcap)


@functools.partial(jax.checkpoint, static_argnums=(2, 3), prevent_cse=False)
def _attend(
    query: Float[Array, "B R T H d"],
    parts: Sequence[KeyValues],
    scale: float,
    softcap: float | None,
) -> Float[Array, "B R T H d"]:
    b, r, t, h, d = query.shape
    k = parts[0][0].shape[-2]
    # Heads in front make every product one of contiguous matrices, in this order of the axes.
    query = (query * scale).reshape(b, r, t, k, h // k, d).transpose(0, 3, 1, 4, 2, 5)
    scored = [_score(query, key, mask, softcap) for key, _, mask in parts]
    highest = functools.reduce(jnp.maximum, [s.max(axis=-1, keepdims=True) for s in scored])
    highest = jax.lax.stop_gradient(highest)
    # Dividing after the product with the values spares a pass over [T, S] here and two in the
    # backward pass.
    out, total = jnp.zeros((), highest.dtype), jnp.zeros((), highest.dtype)
    for score, (_, value, _) in zip(scored, parts, strict=True):
        weights = jnp.exp(score - highest)
        total += weights.sum(axis=-1, keepdims=True)
        subscripts = "bkrgts,bskd->bkrgtd" if value.ndim == 4 else "bkrgts,brskd->bkrgtd"
        out += jnp.einsum(subscripts, weights.astype(value.dtype), value)
    out = (out / total).astype(query.dtype)
    return out.transpose(0, 2, 4, 1, 3, 5).reshape(b, r, t, h, d)


def _score(
    query: Float[Array, "B K R G T d"],
    key: Float[Array, "B *R S K d"],
    mask: Bool[Array, "..."] | None,
    softcap: float | None,
) -> Float[Array, "B K R G T S"]:
    """Scores [B, K, R, G, T, S] of queries [B, K, R, G, T, d], very low where masked."""
    subscripts = "bkrgtd,bskd->bkrgts" if key.ndim == 4 else "bkrgtd,brskd->bkrgts"
    dtype = jnp.promote_types(query.dtype, jnp.float32)
    score = capped(jnp.einsum(subscripts, query, key, preferred_element_type=dtype), softcap)
    if mask is None:
        return score
    b, _, r, _, t, s = score.shape
    mask = jnp.broadcast_to(mask, (b, r, t, s))[:, None, :, None]
    # Added, not selected: its derivative costs nothing.
    return score + jnp.where(mask, 0, jnp.finfo(score.dtype).min / 2)


@dataclasses.dataclass(frozen=True)
class CachedPart:
    """Keys and values of a cache, which queries of all groups see, or those of each group."""

    heads: int
    """K."""
    load: Callable[[], tuple[jax.Array, jax.Array]]
    """Keys [B, K, d, S] and values [B, K, S, d], or of each group [B, G, K, d, S] and
    [B, G, K, S, d]."""
    mask: Bool[Array, "..."]
    """Which a query sees; broadcasts to [B, G, M, S]."""
    is_read: Bool[Array, ""] | None = None
    """Whether any query sees any of them, where that is to be asked."""


def cached_attention(
    query: Float[Array, "B G M H d"],
    parts: Sequence[CachedPart],
    scale: float,
    softcap: float | None = None,
) -> Float[Array, "B G M H d"]:
    """`attend` for decoding: keys and values come as caches lie, and are multiplied as they lie.

    Args:
      query: [B, G, M, H, d], G groups of M queries.
      parts: what is read; one that no query sees takes no time.
      scale, softcap: as `attend` takes them.

    Returns:
      [B, G, M, H, d] in the query's dtype. A query that sees no key gets a finite value.
    """
    b, g, m, h, d = query.shape
    heads = parts[0].heads
    # Heads in front, and behind them the queries that share them.
    query = (query * scale).reshape(b, g, m, heads, h // heads, d).transpose(0, 1, 3, 2, 4, 5)
    found = [_read(query, part, softcap) for part in parts]
    highest = functools.reduce(jnp.maximum, [of_part for of_part, _, _ in found])
    out, total = jnp.zeros((), highest.dtype), jnp.zeros((), highest.dtype)
    for of_part, weight, read in found:
        share = jnp.exp(of_part - highest)
        total += share * weight
        out += share * read
    out = (out / total).astype(query.dtype)
    return out.transpose(0, 1, 3, 2, 4, 5).reshape(b, g, m, h, d)


def _read(
    query: Float[Array, "B G K M r d"], part: CachedPart, softcap: float | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What queries read of one part: (the highest score [B, G, K, M, r, 1], the sum of weights
    against it, the values by these weights [B, G, K, M, r, d])."""
    b, g, heads, m, r, _ = query.shape
    dtype = jnp.promote_types(query.dtype, jnp.float32)

    def arranged(x: jax.Array, whole: jax.Array) -> jax.Array:
        """Queries as the part's keys are multiplied: with those of all groups, or of each."""
        if whole.ndim == 4:
            return x.swapaxes(1, 2).reshape(b, heads, -1, x.shape[-1])
        return x.reshape(b, g, heads, -1, x.shape[-1])

    def back(x: jax.Array) -> jax.Array:
        if x.ndim == 5:
            return x.reshape(b, g, heads, m, r, x.shape[-1])
        return x.reshape(b, heads, g, m, r, x.shape[-1]).swapaxes(1, 2)

    def seen() -> tuple[jax.Array, jax.Array, jax.Array]:
        key, value = part.load()
        score = back(jnp.matmul(arranged(query, key), key, preferred_element_type=dtype))
        mask = jnp.broadcast_to(part.mask, (b, g, m, key.shape[-1]))[:, :, None, :, None]
        score = jnp.where(mask, capped(score, softcap), jnp.finfo(dtype).min / 2)
        highest = score.max(axis=-1, keepdims=True)
        weights = jnp.exp(score - highest)
        read = back(jnp.matmul(arranged(weights.astype(value.dtype), value), value))
        return highest, weights.sum(axis=-1, keepdims=True), read.astype(dtype)

    def unseen() -> tuple[jax.Array, jax.Array, jax.Array]:
        lowest = jnp.full((b, g, heads, m, r, 1), jnp.finfo(dtype).min / 2, dtype)
        return lowest, jnp.zeros_like(lowest), jnp.zeros(query.shape, dtype)

    return seen() if part.is_read is None else jax.lax.cond(part.is_read, seen, unseen)


def shared_prompt_attention(
    query: Float[Array, "B S H d"],
    key: Float[Array, "B S K d"],
    value: Float[Array, "B S K d"],
    prompt_mask: Bool[Array, "B P"],
    response_mask: Bool[Array, "B R T"],
    window: int | None = None,
    backend: str = "auto",
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sees_images: bool = False,
    images: Images | None = None,
) -> Float[Array, "B S H d"]:
    """Attention of a prompt and R responses to it, laid out as one sequence.

    Prompt tokens see earlier prompt tokens; a response's tokens see the whole prompt and their own
    earlier tokens, never a sibling. For a prompt `p p` and responses `a a`, `b b` (row sees
    column):

            p p a a b b
        p   1 . . . . .
        p   1 1 . . . .
        a   1 1 1 . . .
        a   1 1 1 1 . .
        b   1 1 . . 1 .
        b   1 1 . . 1 1

    The zero blocks between siblings are not computed, nor most of what lies above the diagonal.

    Args:
      query: [B, S, H, d] with S = P + R*T: the prompt, then the responses one after another.
      key, value: [B, S, K, d].
      prompt_mask: bool[B, P].
      response_mask: bool[B, R, T]; R may be 0. Both masks are True from their start on and False
        from their end on.
      window: how many tokens a query sees, itself included; None for all.
      backend: one of `BACKENDS`; see `choose_backend`.
      scale: factor of the scores; None for 1/sqrt(d).
      softcap: what scores are kept below, see `capped`.
      sees_images: whether tokens of an image see all others of it, the later ones too.
      images: what prompt and responses show where; None where there are no images.

    Returns:
      [B, S, H, d]. What padding sees depends on the backend and is finite.
    """
    if window is not None and window >= prompt_mask.shape[1] + response_mask.shape[2]:
        window = None
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    arguments = query, key, value, prompt_mask, response_mask
    images = images if sees_images else None
    chosen = choose_backend(
        backend, query, prompt_mask, response_mask, window, softcap, images is not None
    )
    if chosen == "splash":
        interpret = platform() != "tpu"
        return splash.splash_attention(*arguments, scale, softcap, interpret=interpret)
    if chosen == "cudnn":
        return cudnn.cudnn_attention(*arguments, scale)
    return xla_attention(*arguments, window, scale, softcap, images)


def choose_backend(
    asked: str,
    query: Float[Array, "B S H d"],
    prompt_mask: Bool[Array, "B P"],
    response_mask: Bool[Array, "B R T"],
    window: int | None,
    softcap: float | None = None,
    images: bool = False,
) -> str:
    """The backend of `shared_prompt_attention` for its arguments.

    Args:
      asked: one of `BACKENDS`. "auto" is splash attention on TPU, cuDNN on GPU, XLA elsewhere.
        Splash attention is interpreted where there is no TPU, which only tests want.
      query, prompt_mask, response_mask, window, softcap: of `shared_prompt_attention`.
      images: whether there are images whose tokens see one another.

    Returns:
      "xla", "splash" or "cudnn"; XLA, and a line in the log that says why, where the kernel does
      not compute this.

    Raises:
      ValueError: there is no such backend.
    """
    if asked not in BACKENDS:
        raise ValueError(f"attention is {asked!r}; there are {', '.join(BACKENDS)}")
    own = platform()
    chosen = PLATFORM_BACKENDS.get(own, "xla") if asked == "auto" else asked
    reason = None
    if chosen == "splash":
        reason = splash.unsupported(query, window)
    elif chosen == "cudnn":
        reason = f"{own} is no GPU"
        if own == "gpu":
            reason = cudnn.unsupported(query, prompt_mask, response_mask, window, softcap)
    if images and chosen != "xla":
        reason = "it knows no images, whose tokens see one another"
    if reason is None:
        if chosen == "splash" and own != "tpu":
            _warn_once(f"splash attention is interpreted, which is slow: {own} is no TPU")
        return chosen
    _warn_once(f"attention is computed by xla and not by {chosen}: {reason}")
    return "xla"


@functools.cache
def _warn_once(message: str) -> None:
    log.warning(message)


def platform() -> str:
    """What the program that is being traced will run on: "cpu", "gpu" or "tpu".

    The mesh in use knows, also when it is of devices that are not there, to compile ahead of time.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def xla_attention(
    query: Float[Array, "B S H d"],
    key: Float[Array, "B S K d"],
    value: Float[Array, "B S K d"],
    prompt_mask: Bool[Array, "B P"],
    response_mask: Bool[Array, "B R T"],
    window: int | None,
    scale: float,
    softcap: float | None,
    images: Images | None = None,
) -> Float[Array, "B S H d"]:
    """`shared_prompt_attention` on any platform, in plain JAX.

    Prompt queries are taken in blocks, each against the keys from the first that its window
    reaches up to its own end, or that of an image which it may be in.
    """
    b, _, h, d = query.shape
    p, (r, t) = prompt_mask.shape[1], response_mask.shape[1:]
    k = key.shape[2]
    prompt_key, prompt_value = key[:, :p], value[:, :p]
    out = []
    block = max(MIN_QUERY_BLOCK, -(-p // MAX_QUERY_BLOCKS))
    for start in range(0, p, block):
        stop = min(start + block, p)
        first = 0 if window is None else max(0, start + 1 - window)
        end, same = stop, None
        if images is not None:
            end = min(p, stop + images.longest - 1)
            numbers = images.tokens[:, None]
            same = same_image(numbers[..., start:stop], numbers[..., first:end])
        distance = jnp.arange(start, stop)[:, None] - jnp.arange(first, end)
        mask = in_window(distance, window, same) & prompt_mask[:, None, None, first:end]
        part = prompt_key[:, first:end], prompt_value[:, first:end], mask
        out.append(attend(query[:, None, start:stop], [part], scale, softcap)[:, 0])
    if r:
        steps = jnp.arange(t)
        same = None
        if images is not None and images.responses is not None:
            same = same_image(images.responses, images.responses)
        own = in_window(steps[:, None] - steps, window, same) & response_mask[:, :, None, :]
        seen = prompt_mask[:, None, None, :]
        if window is not None:
            # A response begins where its prompt ends, not where the padding does.
            places = prompt_mask.sum(axis=1)[:, None, None, None] + steps[:, None]
            seen = seen & in_window(places - jnp.arange(p), window)
        own_key, own_value = (x[:, p:].reshape(b, r, t, k, d) for x in (key, value))
        responses = attend(
            query[:, p:].reshape(b, r, t, h, d),
            [
                (prompt_key, prompt_value, seen),
                (own_key, own_value, own),
            ],
            scale,
            softcap,
        )
        out.append(responses.reshape(b, r * t, h, d))
    return jnp.concatenate(out, axis=1)


def is_packed(backend: str, in_kernels: bool) -> bool:
    """Whether batches are made as `PackedBatch`es.

    Kernels have the layout of `Batch` in their masks; plain JAX computes either.

    Args:
      backend: one of `BACKENDS`.
      in_kernels: whether kernels compute any of the layers.
    """
    if not in_kernels:
        return True
    chosen = PLATFORM_BACKENDS.get(platform(), "xla") if backend == "auto" else backend
    return chosen == "xla"
