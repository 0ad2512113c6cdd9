"""The language-model head: logits of few positions at a time, and what is read of them.

Logits [B, R, T, V] never exist, backward included: the head is applied to a chunk of the positions,
and every device has the logits of its own part of the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from mmpo_jax.models.attention import capped
from mmpo_jax.models.divergence import token_divergence
from mmpo_jax.models.layers import batch_axes, spread_gradient
from mmpo_jax.models.linear import matmul
from mmpo_jax.models.vlm import VisionLanguageModel
from mmpo_jax.models.vocabulary import split_vocabulary

HEAD_BYTES = 64 * 2**20
"""How much one chunk of the head may hold per device: logits, and what it gathers for them."""


class Taught(NamedTuple):
    """What a teacher says at the places of the responses, and how it is compared."""

    hidden: Float[Array, "B R T E"]
    """States of the teacher, of its own width E, that predict each response token."""
    kernel: Float[Array, "E W"]
    """The teacher's head."""
    vocab_size: int
    """Tokens that there are of W."""
    softcap: float | None
    """What its logits are kept below, see `attention.capped`."""
    beta: float
    """How they are compared, see `divergence.token_divergence`."""
    top_k: int | None


def token_statistics(
    hidden: Float[Array, "B R T D"],
    kernel: Float[Array, "D V"],
    labels: Int[Array, "B R T"],
    names: Collection[str] = (),
    reference: tuple[Float[Array, "B R T D"], Float[Array, "D V"]] | None = None,
    chunk: int | None = None,
    partners: Sequence[int] = (0,),
    temperature: float = 1.0,
    vocab_size: int | None = None,
    softcap: float | None = None,
    teacher: Taught | None = None,
) -> dict[str, Float[Array, "B R T"]]:
    """log softmax(hidden @ kernel / temperature)[labels], and more, without storing the logits.

    On a mesh every device computes the logits of its own part of the vocabulary, for the rows of
    all devices that share the axis `fsdp`: what travels is hidden states. With rows of its own it
    would hold the whole head and the head's whole gradient, gigabytes, and exchange both with
    every chunk.

    Args:
      hidden: [B, R, T, D].
      kernel: [D, V].
      labels: int32[B, R, T].
      names: what else is wanted: `collision` log sum_v p_v^2, `logit` the label's logit, `kl`
        KL(reference || this) over the vocabulary, `own` the log-prob of the token that is most
        probable in the row's partner, `entropy` that of the distribution, `divergence` that of the
        teacher's from it.
      reference: hidden states and head of a reference.
      chunk: positions of T per step; the backward pass recomputes each step's logits.
      partners: rows come in groups of C; for each of a group, the place of its partner in it.
      temperature: all logits are divided by it, the reference's too.
      vocab_size: tokens that there are; the kernel may have more, see `vocabulary`. None for V.
      softcap: what logits are kept below, see `attention.capped`.
      teacher: what a teacher says, for `divergence`.

    Returns:
      name -> float32[B, R, T]: `log_probs`, `names`, and if there is a reference
      `reference_log_probs`, and `reference_logit` and `reference_own` beside `logit` and `own`.
    """
    b, r, t, _ = hidden.shape
    heads = [(hidden, split_vocabulary(kernel))]
    if reference is not None:
        heads.append((reference[0], split_vocabulary(reference[1])))
    taught = [] if teacher is None else [(teacher.hidden, split_vocabulary(teacher.kernel))]
    chunk = chunk or head_chunk(b * r * len(heads + taught), t, *kernel.shape)
    steps = -(-t // chunk)
    pad = steps * chunk - t

    mesh = jax.sharding.get_abstract_mesh()
    by_rows = PartitionSpec() if mesh.empty else PartitionSpec(batch_axes(mesh))

    def partner(x: jax.Array) -> jax.Array:
        groups = x.reshape(-1, len(partners), *x.shape[1:])
        return groups[:, jnp.array(partners)].reshape(x.shape)

    def score(_, inputs):
        targets, *states = inputs
        states = [spread_gradient(x, by_rows) for x in states]
        states, of_teacher = states[: len(heads)], states[len(heads) :]
        logits, normaliser, chosen = [], [], []
        for x, (_, kernel) in zip(states, heads, strict=True):
            made = split_vocabulary(project(x, kernel, vocab_size, softcap))
            logits.append(made / temperature)
            normaliser.append(jax.nn.logsumexp(logits[-1], axis=-1, keepdims=True))
            chosen.append(jnp.take_along_axis(logits[-1], targets[..., None], axis=-1))
        log_probs = [value - norm for value, norm in zip(chosen, normaliser, strict=True)]
        found = dict(zip(("log_probs", "reference_log_probs"), log_probs, strict=False))
        if "logit" in names:
            found |= dict(zip(("logit", "reference_logit"), chosen, strict=False))
        if "own" in names:
            best = [partner(jnp.argmax(x, axis=-1))[..., None] for x in logits]
            own = [
                jnp.take_along_axis(x, token, axis=-1) - norm
                for x, token, norm in zip(logits, best, normaliser, strict=True)
            ]
            found |= dict(zip(("own", "reference_own"), own, strict=False))
        if "collision" in names:
            twice = 2 * (logits[0] - normaliser[0])
            found["collision"] = jax.nn.logsumexp(twice, axis=-1, keepdims=True)
        if "kl" in names:
            ours, theirs = (x - norm for x, norm in zip(logits, normaliser, strict=True))
            found["kl"] = jnp.sum(jnp.exp(theirs) * (theirs - ours), axis=-1, keepdims=True)
        if "entropy" in names:
            ours = logits[0] - normaliser[0]
            found["entropy"] = -jnp.sum(jnp.exp(ours) * ours, axis=-1, keepdims=True)
        if teacher is not None:
            _, kernel = taught[0]
            theirs = project(of_teacher[0], kernel, teacher.vocab_size, teacher.softcap)
            shared = min(theirs.shape[-1], logits[0].shape[-1])
            ours, theirs = (
                jax.nn.log_softmax(split_vocabulary(x[..., :shared]), axis=-1)
                for x in (logits[0], theirs / temperature)
            )
            found["divergence"] = token_divergence(ours, theirs, teacher.beta, teacher.top_k)[
                ..., None
            ]
        return None, {name: values[..., 0] for name, values in found.items()}

    def split(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, ((0, 0), (0, 0), (0, pad), *[(0, 0)] * (x.ndim - 3)))
        return jnp.moveaxis(x.reshape(b, r, steps, chunk, *x.shape[3:]), 2, 0)

    inputs = (split(labels), *(split(x) for x, _ in heads + taught))
    _, found = jax.lax.scan(jax.checkpoint(score, prevent_cse=False), None, inputs)
    return {
        name: jnp.moveaxis(x, 0, 2).reshape(b, r, steps * chunk)[:, :, :t]
        for name, x in found.items()
    }


def head_chunk(rows: int, length: int, size: int, vocab_size: int) -> int:
    """Response positions per application of the head: as few, equal steps as the budget allows.

    Args:
      rows: B * R.
      length: T.
      size: D; where the vocabulary is split, hidden states of other devices' rows count too.
      vocab_size: V.
    """
    numbers = vocab_size
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty:
        data = mesh.shape.get("data", 1)
        rows, split = math.ceil(rows / data), mesh.size // data
        numbers = math.ceil(vocab_size / split) + (size if split > 1 else 0)
    steps = -(-length * rows * numbers * 4 // HEAD_BYTES)
    return max(1, -(-length // max(1, steps)))


def next_token_logits(
    module: VisionLanguageModel, hidden: Float[Array, "*b D"]
) -> Float[Array, "*b V"]:
    """[..., D] -> float32 logits [..., V]; for a few positions only."""
    decoder = module.config.decoder
    kernel = module.language_model.head_kernel()
    return project(hidden, kernel, decoder.vocab_size, decoder.softcap)


def project(
    hidden: Float[Array, "*b D"],
    kernel: Float[Array, "D W"],
    vocab_size: int | None = None,
    softcap: float | None = None,
) -> Float[Array, "*b V"]:
    """hidden [..., D] @ kernel [D, W] in float32 at least: bfloat16 logits are 0.06 off at 20.

    Of a kernel that was filled up the first V = `vocab_size` columns are tokens. With a softcap,
    logits are kept below it, see `attention.capped`.
    """
    dtype = jnp.promote_types(hidden.dtype, jnp.float32)
    return capped(matmul(hidden, kernel, dtype)[..., :vocab_size], softcap)
