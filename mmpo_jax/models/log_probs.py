"""Log-probs of responses under a model: the function every method here is built on."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from mmpo_jax.models.batch import Batch
from mmpo_jax.models.layers import matmul
from mmpo_jax.models.model import Model, Params
from mmpo_jax.models.vlm import VisionLanguageModel

HEAD_BYTES = 64 * 2**20
"""How much one chunk of the head may hold per device: logits, and what it gathers for them."""


def response_log_probs(
    model: Model, params: Params, batch: Batch, *, remat: str = "none", chunk: int | None = None
) -> jax.Array:
    """Log-prob of every response token, images encoded and prompts decoded once.

    Equal to running each response in a row of its own. The head is applied at response positions
    only and `chunk` of them at a time, so logits [B, R, T, V] never exist, backward included.

    Args:
      model: the architecture.
      params: its parameters; their dtype is the compute dtype.
      batch: B prompts with R responses each.
      remat: rematerialisation policy of the layers, see `layers.rematerialise`.
      chunk: response positions per application of the head; None picks it by `HEAD_BYTES`.

    Returns:
      float32[B, R, T] (float64 for float64 parameters), 0 at padding.
    """
    module = model.bind(params)
    last, responses = module.hidden_states(batch, remat)
    predictors = shift_right(last, responses)
    return (
        token_log_probs(predictors, module.language_model.head_kernel(), batch.response_ids, chunk)
        * batch.response_mask
    )


def shift_right(last: jax.Array, responses: jax.Array) -> jax.Array:
    """Hidden states that predict each response token, [B, R, T, D].

    The first token of every response is predicted from the prompt's last position `last` [B, D],
    the others from the token before them.
    """
    b, r, _, d = responses.shape
    first = jnp.broadcast_to(last[:, None, None, :], (b, r, 1, d))
    return jnp.concatenate([first, responses[:, :, :-1]], axis=2)


def token_log_probs(
    hidden: jax.Array, kernel: jax.Array, labels: jax.Array, chunk: int | None = None
) -> jax.Array:
    """log softmax(hidden @ kernel)[labels] without storing the logits.

    On a mesh every device computes the logits of its own part of the vocabulary, for the rows of
    all devices that share the axis `fsdp`: what travels is hidden states. With rows of its own it
    would hold the whole head and the head's whole gradient, gigabytes, and exchange both with
    every chunk.

    Args:
      hidden: [B, R, T, D].
      kernel: [D, V].
      labels: int32[B, R, T].
      chunk: positions of T per step; the backward pass recomputes each step's logits.

    Returns:
      float32[B, R, T].
    """
    b, r, t, d = hidden.shape
    chunk = chunk or head_chunk(b * r, t, *kernel.shape)
    kernel = split_vocabulary(kernel)
    steps = -(-t // chunk)
    pad = steps * chunk - t
    hidden = jnp.pad(hidden, ((0, 0), (0, 0), (0, pad), (0, 0)))
    labels = jnp.pad(labels, ((0, 0), (0, 0), (0, pad)))

    def score(_, inputs):
        x, targets = inputs
        logits = split_vocabulary(project(x, kernel))
        chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return None, chosen - jax.nn.logsumexp(logits, axis=-1)

    inputs = (
        hidden.reshape(b, r, steps, chunk, d).transpose(2, 0, 1, 3, 4),
        labels.reshape(b, r, steps, chunk).transpose(2, 0, 1, 3),
    )
    _, scores = jax.lax.scan(jax.checkpoint(score, prevent_cse=False), None, inputs)
    return scores.transpose(1, 2, 0, 3).reshape(b, r, steps * chunk)[:, :, :t]


def split_vocabulary(x: jax.Array) -> jax.Array:
    """Spreads the last axis of the head [D, V] or of logits [B, R, t, V] over the mesh, if one is
    in use; rows stay where their axis `data` puts them."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    rows = "data" if x.ndim > 2 and "data" in mesh.axis_names else None
    over = tuple(axis for axis in mesh.axis_names if axis != "data")
    spec = PartitionSpec(rows, *[None] * (x.ndim - 2), over)
    return jax.lax.with_sharding_constraint(x, spec)


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


def next_token_logits(module: VisionLanguageModel, hidden: jax.Array) -> jax.Array:
    """[..., D] -> float32 logits [..., V]; for a few positions only."""
    return project(hidden, module.language_model.head_kernel())


def project(hidden: jax.Array, kernel: jax.Array) -> jax.Array:
    """hidden [..., D] @ kernel [D, V] in float32 at least: bfloat16 logits are 0.06 off at 20."""
    dtype = jnp.promote_types(hidden.dtype, jnp.float32)
    return matmul(hidden, kernel, dtype)
