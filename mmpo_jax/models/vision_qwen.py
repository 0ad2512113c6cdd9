"""The vision transformer of Qwen2.5-VL: patches of images of any size, most layers in windows.

Patches come in *slots*, the rows of `Batch.pixel_values`. A slot has room for one full attention
window and holds whole windows, so that attention within windows is attention within slots. Where
patches go is worked out on the host (`families/qwen2_5_vl.py`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int, Shaped

from mmpo_jax.models.attention import attend
from mmpo_jax.models.config import ModelError, expect
from mmpo_jax.models.layers import (
    ACTIVATIONS,
    GatedMlp,
    constrain_batch,
    linear,
    rematerialise,
    stack_layers,
)
from mmpo_jax.models.rope import Rope, Tables, rope_tables, rotate

SHARDING_RULES: tuple[tuple[str, PartitionSpec], ...] = (
    (r"vision_tower/patch_embedding/kernel", PartitionSpec(None, "fsdp")),
    (
        r"vision_tower/layers/(attn/qkv|mlp/(gate|up)_proj)/kernel",
        PartitionSpec(None, "fsdp", "tensor"),
    ),
    (
        r"vision_tower/layers/(attn/proj|mlp/down_proj)/kernel",
        PartitionSpec(None, "tensor", "fsdp"),
    ),
    (r"multi_modal_projector/linear_1/kernel", PartitionSpec("fsdp", "tensor")),
    (r"multi_modal_projector/linear_2/kernel", PartitionSpec("tensor", "fsdp")),
    (r"(vision_tower|multi_modal_projector)/.*(bias|scale)", PartitionSpec()),
)

NORM_EPS = 1e-6
"""Part of the architecture: no config states it."""

QUERY_SLOTS = 4
"""Slots whose patches attend together where attention is not within windows."""

Heads = Float[Array, "B S H d"]
Attention = Callable[[Heads, Heads, Heads], Heads]
"""(query, key, value), [B, S, H, d] each -> [B, S, H, d]."""


@dataclasses.dataclass(frozen=True)
class QwenVisionConfig:
    """Sizes are in pixels, patches or channels."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    hidden_act: str
    num_channels: int
    patch_size: int
    temporal_patch_size: int
    """Frames that one patch is cut from; an image is repeated."""
    merge_size: int
    """Patches along a side of the square that becomes one token."""
    window: int
    """Tokens along a side of an attention window."""
    full_layers: tuple[int, ...]
    """Layers that attend to whole images instead of windows."""
    rope: Rope
    """Its two position axes are row and column."""

    @property
    def slot_tokens(self) -> int:
        return self.window**2

    @property
    def slot_patches(self) -> int:
        return self.slot_tokens * self.merge_size**2

    @property
    def patch_inputs(self) -> int:
        return self.num_channels * self.temporal_patch_size * self.patch_size**2


def read_vision(config: Any, key: str = "vision_config") -> QwenVisionConfig:
    """The tower of a transformers `Qwen2_5_VLVisionConfig`.

    Raises:
      ModelError: a switch that is not implemented.
    """
    expect(config.hidden_act, tuple(ACTIVATIONS), f"{key}.hidden_act")
    for name in ("patch_size", "temporal_patch_size"):
        if not isinstance(getattr(config, name), int):
            raise ModelError(f"{key}.{name} is {getattr(config, name)!r}, expected one number")
    return QwenVisionConfig(
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_layers=config.depth,
        num_heads=config.num_heads,
        hidden_act=config.hidden_act,
        num_channels=config.in_channels,
        patch_size=config.patch_size,
        temporal_patch_size=config.temporal_patch_size,
        merge_size=config.spatial_merge_size,
        window=config.window_size // config.patch_size // config.spatial_merge_size,
        full_layers=tuple(config.fullatt_block_indexes),
        rope=_axial_rope(
            config.rope_parameters["rope_theta"], config.hidden_size // config.num_heads
        ),
    )


def _axial_rope(theta: float, head_dim: int) -> Rope:
    """Half of a head's channels turn by the row, half by the column, by the same frequencies."""
    exponents = np.arange(0, head_dim // 2, 2, dtype=np.float32) / np.float32(head_dim // 2)
    axis = tuple(map(float, 1 / np.float32(theta) ** exponents))
    return Rope(axis + axis, sections=(len(axis), len(axis)))


class SelfAttention(nnx.Module):
    """The projections of multi-head attention; what is attended to is the caller's."""

    def __init__(self, config: QwenVisionConfig, rngs: nnx.Rngs):
        self.num_heads = config.num_heads
        size = config.hidden_size
        self.qkv = linear(size, 3 * size, True, rngs)
        self.proj = linear(size, size, True, rngs, 2 * config.num_layers)

    def __call__(
        self, x: Float[Array, "B S D"], rope: Tables, attention: Attention
    ) -> Float[Array, "B S D"]:
        heads = self.qkv(x).reshape(*x.shape[:2], 3, self.num_heads, -1)
        query, key, value = (heads[:, :, i] for i in range(3))
        attended = attention(rotate(query, rope), rotate(key, rope), value)
        return self.proj(attended.reshape(x.shape))


class EncoderLayer(nnx.Module):
    """One pre-norm transformer layer."""

    def __init__(self, config: QwenVisionConfig, rngs: nnx.Rngs):
        size = config.hidden_size
        self.norm1 = nnx.RMSNorm(size, epsilon=NORM_EPS, rngs=rngs)
        self.attn = SelfAttention(config, rngs)
        self.norm2 = nnx.RMSNorm(size, epsilon=NORM_EPS, rngs=rngs)
        self.mlp = GatedMlp(
            size, config.intermediate_size, config.hidden_act, True, 2 * config.num_layers, rngs
        )

    def __call__(
        self, x: Float[Array, "B S D"], rope: Tables, attention: Attention
    ) -> Float[Array, "B S D"]:
        x = x + self.attn(self.norm1(x), rope, attention)
        return x + self.mlp(self.norm2(x))


class QwenVisionTower(nnx.Module):
    """Patches to features, both in slots."""

    def __init__(self, config: QwenVisionConfig, rngs: nnx.Rngs):
        self.config = config
        self.patch_embedding = linear(config.patch_inputs, config.hidden_size, False, rngs)
        self.layers = stack_layers(lambda r: EncoderLayer(config, r), config.num_layers, rngs)

    def __call__(
        self,
        pixels: Float[Array, "B I S inputs"],
        places: Int[Array, "B I S 2"],
        frames: Int[Array, "B I S"],
        remat: str,
    ) -> Float[Array, "B I S D"]:
        """The last layer's output, without a norm; every merged square is contiguous.

        Args:
          pixels: [B, I, S, C*t*h*w], I slots of S patches.
          places: int32[B, I, S, 2], row and column of every patch in its image.
          frames: int32[B, I, S], which frame of the prompt's images and videos it is of, 0 for
            padding, which sees nothing but itself and is not seen.
          remat: rematerialisation policy, see `layers.rematerialise`.

        Returns:
          [B, I, S, D].
        """
        b, i, s = frames.shape
        x = self.patch_embedding(pixels.astype(self.patch_embedding.kernel.dtype))
        x = constrain_batch(x.reshape(b, i * s, -1))
        rope = rope_tables(places.reshape(b, i * s, 2).swapaxes(1, 2), self.config.rope)
        side = self.config.window * self.config.merge_size
        windows = jnp.concatenate([frames[..., None], places // side], axis=-1)
        graphdef, parameters = nnx.split(self.layers)

        def body(x: Float[Array, "B S D"], inputs: tuple) -> tuple[Float[Array, "B S D"], None]:
            parameters, full = inputs

            def attention(query: Heads, key: Heads, value: Heads) -> Heads:
                return jax.lax.cond(
                    full,
                    lambda *qkv: attend_frames(frames, *qkv),
                    lambda *qkv: attend_windows(windows, *qkv),
                    query,
                    key,
                    value,
                )

            layer = nnx.merge(graphdef, parameters)
            return constrain_batch(layer(x, rope, attention)), None

        full = jnp.array(np.isin(np.arange(self.config.num_layers), self.config.full_layers))
        x, _ = jax.lax.scan(rematerialise(body, remat), x, (parameters, full))
        return x.reshape(b, i, s, -1)


def attend_windows(windows: Int[Array, "B I P 3"], query: Heads, key: Heads, value: Heads) -> Heads:
    """Attention among the patches of a slot that are of the same window.

    Args:
      windows: int32[B, I, S, 3], numbers that tell the windows of a slot apart.
      query, key, value: [B, I*S, H, d].

    Returns:
      [B, I*S, H, d].
    """
    slots = (*windows.shape[:3], *query.shape[2:])
    same = (windows[:, :, :, None] == windows[:, :, None]).all(axis=-1)
    part = key.reshape(slots), value.reshape(slots), same
    attended = attend(query.reshape(slots), [part], query.shape[-1] ** -0.5)
    return attended.reshape(query.shape)


def attend_frames(frames: Int[Array, "B I P"], query: Heads, key: Heads, value: Heads) -> Heads:
    """Attention among the patches of the same frame, a few slots of queries at a time.

    Args:
      frames: int32[B, I, S].
      query, key, value: [B, I*S, H, d].

    Returns:
      [B, I*S, H, d].
    """
    b, i, s = frames.shape
    frames = frames.reshape(b, i * s)
    step = math.gcd(i, QUERY_SLOTS) * s

    # Not only the scores but also the mask would be kept for the backward pass, [S, S].
    @jax.checkpoint
    def block(part: tuple[Heads, Int[Array, "B S"]]) -> Heads:
        query, own = part
        same = own[:, None, :, None] == frames[:, None, None]
        return attend(query[:, None], [(key, value, same)], query.shape[-1] ** -0.5)[:, 0]

    def split(x: Shaped[Array, "B S *d"]) -> Shaped[Array, "blocks B step *d"]:
        return jnp.moveaxis(x.reshape(b, -1, step, *x.shape[2:]), 1, 0)

    attended = jax.lax.map(block, (split(query), split(frames)))
    return jnp.moveaxis(attended, 0, 1).reshape(query.shape)


class PatchMerger(nnx.Module):
    """Squares of neighbouring patches to one token each, in the decoder's width."""

    def __init__(self, config: QwenVisionConfig, outputs: int, rngs: nnx.Rngs):
        self.inputs = config.hidden_size * config.merge_size**2
        self.norm = nnx.RMSNorm(config.hidden_size, epsilon=NORM_EPS, rngs=rngs)
        self.linear_1 = linear(self.inputs, self.inputs, True, rngs)
        self.linear_2 = linear(self.inputs, outputs, True, rngs)

    def __call__(self, x: Float[Array, "B I S D"]) -> Float[Array, "B M F"]:
        """[B, I, S, D], the patches of a square one after another -> [B, squares, outputs]."""
        merged = self.norm(x).reshape(x.shape[0], -1, self.inputs)
        return self.linear_2(ACTIVATIONS["gelu"](self.linear_1(merged)))
