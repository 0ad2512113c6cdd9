"""Splash attention over a shared prompt: JAX's own Pallas kernel for TPU, under our mask.

The kernel goes through the scores block by block and keeps none of them. Blocks that no query of
theirs sees a key in, those above the diagonal and between sibling responses, are not visited.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel,
    splash_attention_mask,
)
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float

from mmpo_jax.models.layers import ATTENDED, batch_axes

LANES = 128
"""Blocks are multiples of the width of the vector unit."""
BLOCK = 512
"""Queries or keys of a block, at most: scores of 1 MiB."""


@dataclasses.dataclass(frozen=True)
class SharedPromptMask(splash_attention_mask.Mask):
    """What may be seen, by place in the sequence: prompt, responses, then what fills the blocks.

    The kernel cuts it into blocks, so [S, S] is never made. What fills the last block counts as
    further responses, and so every query sees itself at least.
    """

    size: int
    """S, filled up to whole blocks."""
    prompt: int
    """P."""
    response: int
    """T; 0 without responses."""

    @property
    def shape(self) -> tuple[int, int]:
        return self.size, self.size

    def __getitem__(self, index: tuple[slice, slice]) -> np.ndarray:
        places = np.arange(self.size)
        query, key = places[index[0], None], places[None, index[1]]
        length = max(1, self.response)
        own = self.prompt + (query - self.prompt) // length * length  # where its response begins
        return (key <= query) & ((key < self.prompt) | (key >= own))


def unsupported(query: Float[Array, "B S H d"], window: int | None) -> str | None:
    """Why these arguments of `shared_prompt_attention` are none for this kernel, if they are not.

    A window reaches back from a response to the end of its own prompt, which is another one in
    every row, while the kernel's mask is one for all rows and known when it is compiled.
    """
    if window is not None:
        return "it has no windows that begin at each prompt's own end"
    if query.dtype not in (jnp.bfloat16, jnp.float32):
        return f"it computes in bfloat16 and float32, and not in {query.dtype}"
    return None


def splash_attention(
    query: Float[Array, "B S H d"],
    key: Float[Array, "B S K d"],
    value: Float[Array, "B S K d"],
    prompt_mask: Bool[Array, "B P"],
    response_mask: Bool[Array, "B R T"],
    scale: float,
    softcap: float | None,
    *,
    interpret: bool,
) -> Float[Array, "B S H d"]:
    """`attention.shared_prompt_attention` without a window, as one kernel.

    Of what may be seen, the mask tells the part that all rows have in common. That leaves the
    padding of prompts, from which on keys are not there: queries and keys are of two segments,
    and only those of one segment see each other. Real tokens are of the first, and so is all that
    follows the prompt: padding of responses comes after the tokens that could see it. The second
    is the prompt's padding, queries and keys alike. It sees itself only, so no query is without a
    key, and its values, which nothing reads, are finite.

    Args:
      query, key, value, prompt_mask, response_mask, softcap: as `shared_prompt_attention` takes
        them.
      scale: factor of the scores.
      interpret: runs the kernel's program without a TPU, for tests.

    Returns:
      [B, S, H, d].
    """
    s = query.shape[1]
    p, t = prompt_mask.shape[1], response_mask.shape[2]
    block = block_size(s)
    fill = -s % block
    mask = SharedPromptMask(s + fill, p, t)
    after = jnp.ones((len(prompt_mask), s + fill - p), bool)
    segments = jnp.concatenate([prompt_mask, after], axis=1).astype(jnp.int32)
    heads_first = (
        jnp.pad(x, ((0, 0), (0, fill), (0, 0), (0, 0))).swapaxes(1, 2)
        for x in (query * scale, key, value)
    )

    def attend(query: jax.Array, key: jax.Array, value: jax.Array, rows: jax.Array) -> jax.Array:
        kernel = _make_kernel(mask, query.shape[1], block, softcap, interpret)
        both = splash_attention_kernel.SegmentIds(rows, rows)
        return jax.vmap(kernel)(query, key, value, both)

    heads = query.shape[2], key.shape[2]
    attended = _over_mesh(attend, len(query), heads)(*heads_first, segments)
    return attended.swapaxes(1, 2)[:, :s]


def block_size(length: int) -> int:
    """The smallest that makes as few blocks as `BLOCK` does: 640 tokens are two of 384."""
    count = -(-length // BLOCK)
    return -(-length // (count * LANES)) * LANES


def _make_kernel(
    mask: SharedPromptMask, heads: int, block: int, softcap: float | None, interpret: bool
) -> Callable[..., jax.Array]:
    sizes = splash_attention_kernel.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    return splash_attention_kernel.make_splash_mha(
        splash_attention_mask.MultiHeadMask([mask] * heads),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=softcap,
        # What the backward pass needs of the forward one: without it, it would run twice.
        residual_checkpoint_name=ATTENDED,
        interpret=interpret,
    )


def _over_mesh(
    attend: Callable[..., jax.Array], rows: int, heads: tuple[int, int]
) -> Callable[..., jax.Array]:
    """`attend` on every device's own rows and heads: the compiler cannot split a kernel.

    What an axis of the mesh does not divide is computed by all devices of that axis.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return attend
    batch = batch_axes(mesh)
    shards = int(np.prod([mesh.shape[axis] for axis in batch]))
    tensor = mesh.shape.get("tensor", 1)
    split = PartitionSpec(
        batch if rows % shards == 0 else None,
        "tensor" if tensor > 1 and all(count % tensor == 0 for count in heads) else None,
    )
    return jax.shard_map(
        attend,
        mesh=mesh,
        in_specs=(split, split, split, PartitionSpec(split[0])),
        out_specs=split,
        check_vma=False,  # a kernel does not say over which axes its results vary
    )
