"""The vision transformer of Mistral Small 3 and Ministral 3 (Pixtral): patches of images of any
size, turned by their row and column.

Patches come in slots, as those of Qwen's towers do (`vision_qwen.py`), and see all others of their
image.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Shaped

from mmpo_jax.models.config import ModelError, expect
from mmpo_jax.models.layers import (
    ACTIVATIONS,
    GatedMlp,
    constrain_batch,
    rematerialise,
    rms_norm,
    stack_layers,
)
from mmpo_jax.models.linear import linear
from mmpo_jax.models.rope import Rope, Tables, rope_tables, rotate
from mmpo_jax.models.vision_qwen import SLOT_SIDE, Attention, QwenVisionConfig, attend_frames

SHARDING_RULES: tuple[tuple[str, PartitionSpec], ...] = (
    (r"vision_tower/patch_embedding/kernel", PartitionSpec(None, "fsdp")),
    (
        r"vision_tower/layers/(attention/[qkv]_proj|feed_forward/(gate|up)_proj)/kernel",
        PartitionSpec(None, "fsdp", "tensor"),
    ),
    (
        r"vision_tower/layers/(attention/o_proj|feed_forward/down_proj)/kernel",
        PartitionSpec(None, "tensor", "fsdp"),
    ),
    (r"vision_tower/.*scale", PartitionSpec()),
)

NORM_EPS = 1e-5
"""Part of the architecture: no config states it."""


def read_vision(config: Any, merge: int, key: str = "vision_config") -> QwenVisionConfig:
    """The tower of a transformers `PixtralVisionConfig`.

    Args:
      config: of the tower.
      merge: patches along a side of the square that becomes one token.
      key: how error messages call the config.

    Raises:
      ModelError: a switch that is not implemented.
    """
    expect(config.model_type, ("pixtral",), f"{key}.model_type")
    expect(config.hidden_act, tuple(ACTIVATIONS), f"{key}.hidden_act")
    if not isinstance(config.patch_size, int):
        raise ModelError(f"{key}.patch_size is {config.patch_size!r}, expected one number")
    return QwenVisionConfig(
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        hidden_act=config.hidden_act,
        num_channels=config.num_channels,
        patch_size=config.patch_size,
        temporal_patch_size=1,
        merge_size=merge,
        window=SLOT_SIDE,
        full_layers=tuple(range(config.num_hidden_layers)),
        rope=_axial_rope(config, key),
        gated=True,
    )


def _axial_rope(config: Any, key: str) -> Rope:
    """Rows and columns take the frequencies of a head in turns."""
    expect(config.rope_parameters["rope_type"], ("axial",), f"{key}.rope_parameters.rope_type")
    theta, head_dim = config.rope_parameters["rope_theta"], config.head_dim
    if head_dim % 4 or head_dim * config.num_attention_heads != config.hidden_size:
        raise ModelError(
            f"{key} has heads of {head_dim} channels, expected a multiple of 4 that fills its "
            f"hidden_size {config.hidden_size}"
        )
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequencies = tuple(map(float, 1 / np.float32(theta) ** exponents))
    return Rope(frequencies[::2] + frequencies[1::2], sections=(head_dim // 4, head_dim // 4))


class SelfAttention(nnx.Module):
    """The projections of multi-head attention; what is attended to is the caller's."""

    def __init__(self, config: QwenVisionConfig, rngs: nnx.Rngs):
        self.num_heads = config.num_heads
        size = config.hidden_size
        self.q_proj = linear(size, size, False, rngs)
        self.k_proj = linear(size, size, False, rngs)
        self.v_proj = linear(size, size, False, rngs)
        self.o_proj = linear(size, size, False, rngs, 2 * config.num_layers)

    def __call__(
        self, x: Float[Array, "B S D"], rope: Tables, attention: Attention
    ) -> Float[Array, "B S D"]:
        heads = (*x.shape[:2], self.num_heads, -1)
        query, key, value = (f(x).reshape(heads) for f in (self.q_proj, self.k_proj, self.v_proj))
        attended = attention(rotate(query, rope), rotate(key, rope), value)
        return self.o_proj(attended.reshape(x.shape))


class EncoderLayer(nnx.Module):
    """One pre-norm transformer layer."""

    def __init__(self, config: QwenVisionConfig, rngs: nnx.Rngs):
        size, wide, act = config.hidden_size, config.intermediate_size, config.hidden_act
        self.attention_norm = rms_norm(size, NORM_EPS, False, rngs)
        self.attention = SelfAttention(config, rngs)
        self.ffn_norm = rms_norm(size, NORM_EPS, False, rngs)
        self.feed_forward = GatedMlp(size, wide, act, False, 2 * config.num_layers, rngs)

    def __call__(
        self, x: Float[Array, "B S D"], rope: Tables, attention: Attention
    ) -> Float[Array, "B S D"]:
        x = x + self.attention(self.attention_norm(x), rope, attention)
        return x + self.feed_forward(self.ffn_norm(x))


class PixtralTower(nnx.Module):
    """Patches to features, both in slots."""

    def __init__(self, config: QwenVisionConfig, rngs: nnx.Rngs):
        self.rope = config.rope
        self.patch_embedding = linear(config.patch_inputs, config.hidden_size, False, rngs)
        self.pre_norm = rms_norm(config.hidden_size, NORM_EPS, False, rngs)
        self.layers = stack_layers(lambda r: EncoderLayer(config, r), config.num_layers, rngs)

    def __call__(
        self,
        pixels: Float[Array, "B I S inputs"],
        patches: Mapping[str, Shaped[Array, "B I S *n"]],
        remat: str,
    ) -> Float[Array, "B I S D"]:
        """The last layer's output, [B, I, S, D]; every merged square is contiguous.

        Args:
          pixels: [B, I, S, C*h*w], I slots of S patches.
          patches: `places` and `frames`, see `vision_qwen.QwenVisionTower`.
          remat: rematerialisation policy, see `layers.rematerialise`.
        """
        frames = patches["frames"]
        b, i, s = frames.shape
        places = patches["places"].reshape(b, i * s, 2).swapaxes(1, 2)
        rope, attention = rope_tables(places, self.rope), functools.partial(attend_frames, frames)
        x = self.patch_embedding(pixels.astype(self.patch_embedding.kernel.dtype)).reshape(
            b, i * s, -1
        )
        graphdef, parameters = nnx.split(self.layers)

        def body(x: jax.Array, parameters: Any) -> tuple[jax.Array, None]:
            return constrain_batch(nnx.merge(graphdef, parameters)(x, rope, attention)), None

        x = constrain_batch(self.pre_norm(x))
        x, _ = jax.lax.scan(rematerialise(body, remat), x, parameters)
        return x.reshape(b, i, s, -1)
