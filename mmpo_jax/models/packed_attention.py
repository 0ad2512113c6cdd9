"""Attention in rows that hold several records, in plain JAX: `attention` for a `PackedBatch`."""

from __future__ import annotations

from collections.abc import Iterator

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mmpo_jax.models.attention import MAX_QUERY_BLOCKS, MIN_QUERY_BLOCK, attend
from mmpo_jax.models.batch import PackedBatch
from mmpo_jax.models.sight import Images, in_window, same_image


def packed_attention(
    query: Float[Array, "B S H d"],
    key: Float[Array, "B S K d"],
    value: Float[Array, "B S K d"],
    batch: PackedBatch,
    window: int | None = None,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sees_images: bool = False,
    images: Images | None = None,
) -> Float[Array, "B S H d"]:
    """Attention in rows that hold several records, each a prompt and the responses to it.

    Tokens see what they see in `shared_prompt_attention`, and nothing of other records. Queries are
    taken in blocks, see `packed_blocks`.

    Args:
      query: [B, S, H, d].
      key, value: [B, S, K, d].
      batch: says what the rows hold.
      window, scale, softcap, sees_images: as `shared_prompt_attention` takes them.
      images: what the rows show where; None where there are no images.

    Returns:
      [B, S, H, d]. Padding sees padding.
    """
    s, d = query.shape[1], query.shape[-1]
    scale = d**-0.5 if scale is None else scale
    if window is not None and window >= batch.reach:
        window = None
    images = images if sees_images else None
    ahead = images.longest - 1 if images is not None else 0
    response = batch.loss_mask.shape[-1]
    out = []
    # Of a window, too, whose first keys stand before all of a response's siblings.
    for queries, seen in packed_blocks(s, batch.reach, batch.prompt, response, ahead):
        parts = []
        for keys in seen:
            mask = _packed_mask(batch, queries, keys, window, images)
            parts.append((key[:, keys], value[:, keys], mask[:, None]))
        out.append(attend(query[:, None, queries], parts, scale, softcap)[:, 0])
    return jnp.concatenate(out, axis=1)


def packed_blocks(
    length: int, reach: int, prompt: int, response: int, ahead: int = 0
) -> Iterator[tuple[slice, list[slice]]]:
    """Blocks of the queries of packed rows, each with the keys that any of it may see.

    Those are the keys from where a record that ends in the block may have begun. Where every row
    holds one record, behind its prompt they are the prompt's and those from where a response may
    have begun.

    Args:
      length: S, of a row.
      reach, prompt: see `PackedBatch`.
      response: T, no response has more tokens.
      ahead: no token sees one that stands further behind it.
    """
    for first, end in ((0, prompt), (prompt, length)):
        block = max(MIN_QUERY_BLOCK, -(-(end - first) // MAX_QUERY_BLOCKS))
        for start in range(first, end, block):
            stop = min(start + block, end)
            last = min(stop + ahead, end)
            keys = [slice(max(0, start + 1 - reach), last)]
            if 0 < prompt <= start:
                keys = [slice(0, prompt), slice(max(prompt, start + 1 - response), last)]
            yield slice(start, stop), keys


def _packed_mask(
    batch: PackedBatch,
    queries: slice,
    keys: slice,
    window: int | None,
    images: Images | None,
) -> Bool[Array, "B T S"]:
    """Whether a query of some columns sees a key of others, bool[B, queries, keys]."""
    same = batch.record[:, queries, None] == batch.record[:, None, keys]
    owner, other = batch.response[:, queries, None], batch.response[:, None, keys]
    seen = same & ((other == 0) | (other == owner))
    distance = batch.place[:, queries, None] - batch.place[:, None, keys]
    shown = None
    if images is not None:
        shown = same_image(images.tokens[:, queries], images.tokens[:, keys])
    return seen & in_window(distance, window, shown)
