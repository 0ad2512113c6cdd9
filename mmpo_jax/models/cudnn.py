"""cuDNN's fused attention over a shared prompt, through `jax.nn`."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float

from mmpo_jax.models.layers import ATTENDED


def unsupported(
    query: Float[Array, "B S H d"],
    prompt_mask: Bool[Array, "B P"],
    response_mask: Bool[Array, "B R T"],
    window: int | None,
    softcap: float | None,
) -> str | None:
    """Why these arguments of `shared_prompt_attention` are none for cuDNN, if they are not."""
    d = query.shape[-1]
    p, (r, t) = prompt_mask.shape[1], response_mask.shape[1:]
    if window is not None:
        return "windows are not implemented for it"
    if softcap is not None:
        return "it does not keep scores below a limit"
    if query.dtype not in (jnp.bfloat16, jnp.float16):
        return f"it computes in bfloat16 and float16, and not in {query.dtype}"
    if d % 8 or d > 128:
        return f"its heads are multiples of 8 up to 128 wide, and not {d}"
    if r and ((r * t) % 2 or p % 2):
        return f"its masks have even sides, and not P = {p}, R * T = {r * t}"
    return None


def cudnn_attention(
    query: Float[Array, "B S H d"],
    key: Float[Array, "B S K d"],
    value: Float[Array, "B S K d"],
    prompt_mask: Bool[Array, "B P"],
    response_mask: Bool[Array, "B R T"],
    scale: float,
    *,
    implementation: Any = "cudnn",
) -> Float[Array, "B S H d"]:
    """`attention.shared_prompt_attention` without a window, as two kernels.

    The prompt's is causal and needs no mask: its padding lies behind all that is read. The
    responses' has a mask [B, 1, R*T, S], so there is none for the whole sequence.

    Args:
      query, key, value, prompt_mask, response_mask: as `shared_prompt_attention` takes them.
      scale: factor of the scores.
      implementation: of `jax.nn.dot_product_attention`; another one than cuDNN's for tests.

    Returns:
      [B, S, H, d].
    """
    p, (r, t) = prompt_mask.shape[1], response_mask.shape[1:]
    attend = functools.partial(
        jax.nn.dot_product_attention, scale=scale, implementation=implementation
    )
    out = [attend(query[:, :p], key[:, :p], value[:, :p], is_causal=True)]
    if r:
        places = jnp.arange(r * t)
        siblings = places[:, None] // t == places // t
        own = siblings & (places[:, None] >= places)
        rows = len(prompt_mask)
        mask = jnp.concatenate(
            [
                jnp.broadcast_to(prompt_mask[:, None], (rows, r * t, p)),
                jnp.broadcast_to(own, (rows, r * t, r * t)),
            ],
            axis=-1,
        )
        out.append(attend(query[:, p:], key, value, mask=mask[:, None]))
    return checkpoint_name(jnp.concatenate(out, axis=1), ATTENDED)
