"""Attention over one prompt and many responses, and over caches of it.

Queries, keys and values are grouped: H query heads share K key-value heads, H a multiple of K.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mmpo_jax.models.layers import promote


def attend(
    query: jax.Array, parts: list[tuple[jax.Array, jax.Array, jax.Array]], scale: float
) -> jax.Array:
    """Softmax attention of queries over several key-value parts at once.

    Each part is scored by itself and the softmax runs over all of them, so keys shared by many
    queries (a prompt's) are never repeated or concatenated in memory.

    Args:
      query: [B, R, T, H, d], R groups of T queries.
      parts: (key, value, mask) each. A part shared by all groups has key and value [B, S, K, d] and
        a mask that broadcasts to [B, R, T, S]; a part of each group's own has [B, R, S, K, d].
        Masks are bool, True where a query sees a key.
      scale: factor of the scores, usually 1/sqrt(d).

    Returns:
      [B, R, T, H, d] in the query's dtype. A query that sees no key gets a finite value.
    """
    b, r, t, h, d = query.shape
    k = parts[0][0].shape[-2]
    grouped = query.reshape(b, r, t, k, h // k, d)
    scores = []
    for key, _, mask in parts:
        shared = key.ndim == 4
        score = jnp.einsum(
            "brtkgd,bskd->bkgrts" if shared else "brtkgd,brskd->bkgrts", grouped, key
        )
        score = promote(score) * scale
        mask = jnp.broadcast_to(mask, (b, r, t, key.shape[-3]))[:, None, None]
        scores.append(jnp.where(mask, score, jnp.finfo(score.dtype).min))
    weights = jax.nn.softmax(jnp.concatenate(scores, axis=-1), axis=-1).astype(query.dtype)
    splits = [0]
    for key, _, _ in parts:
        splits.append(splits[-1] + key.shape[-3])
    out = jnp.zeros((b, r, t, k, h // k, d), query.dtype)
    for (_, value, _), start, stop in zip(parts, splits[:-1], splits[1:], strict=True):
        shared = value.ndim == 4
        out = out + jnp.einsum(
            "bkgrts,bskd->brtkgd" if shared else "bkgrts,brskd->brtkgd",
            weights[..., start:stop],
            value,
        )
    return out.reshape(b, r, t, h, d)


def shared_prompt_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    prompt_mask: jax.Array,
    response_mask: jax.Array,
) -> jax.Array:
    """Attention of a prompt and R responses to it, laid out as one sequence.

    Prompt tokens see earlier prompt tokens; a response's tokens see the whole prompt and their own
    earlier tokens, never a sibling. For a prompt `p p` and responses `a a`, `b b` (row sees column):

            p p a a b b
        p   1 . . . . .
        p   1 1 . . . .
        a   1 1 1 . . .
        a   1 1 1 1 . .
        b   1 1 . . 1 .
        b   1 1 . . 1 1

    The zero blocks between siblings are not computed.

    Args:
      query: [B, S, H, d] with S = P + R*T: the prompt, then the responses one after another.
      key, value: [B, S, K, d].
      prompt_mask: bool[B, P].
      response_mask: bool[B, R, T]; R may be 0.

    Returns:
      [B, S, H, d].
    """
    b, s, h, d = query.shape
    p, (r, t) = prompt_mask.shape[1], response_mask.shape[1:]
    k = key.shape[2]
    prompt_key, prompt_value = key[:, :p], value[:, :p]
    causal = jnp.tril(jnp.ones((p, p), bool)) & prompt_mask[:, None, None, :]
    scale = d**-0.5
    prompt = attend(query[:, None, :p], [(prompt_key, prompt_value, causal)], scale)
    if r == 0:
        return prompt.reshape(b, s, h, d)
    own_causal = jnp.tril(jnp.ones((t, t), bool)) & response_mask[:, :, None, :]
    responses = attend(
        query[:, p:].reshape(b, r, t, h, d),
        [
            (prompt_key, prompt_value, prompt_mask[:, None, None, :]),
            (
                key[:, p:].reshape(b, r, t, k, d),
                value[:, p:].reshape(b, r, t, k, d),
                own_causal,
            ),
        ],
        scale,
    )
    return jnp.concatenate([prompt[:, 0], responses.reshape(b, r * t, h, d)], axis=1)
