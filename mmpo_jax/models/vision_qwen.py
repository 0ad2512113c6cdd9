"""The vision transformers of Qwen2.5-VL and Qwen3-VL: patches of images of any size.

Patches come in *slots*, the rows of `Batch.pixel_values`. In Qwen2.5-VL most layers attend within
windows: a slot has room for one full window and holds whole windows, so that attention within
windows is attention within slots. Where patches go is worked out on the host (`qwen_media.py`).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Shaped

from mmpo_jax.models.attention import attend
from mmpo_jax.models.config import ModelError, expect
from mmpo_jax.models.layers import (
    ACTIVATIONS,
    GatedMlp,
    Mlp,
    constrain_batch,
    keep_dtype,
    layer_norm,
    promote,
    rematerialise,
    stack_layers,
)
from mmpo_jax.models.linear import linear
from mmpo_jax.models.rope import Rope, Tables, rope_tables, rotate

SHARDING_RULES: tuple[tuple[str, PartitionSpec], ...] = (
    (r"vision_tower/patch_embedding/kernel", PartitionSpec(None, "fsdp")),
    (r"vision_tower/position_embedding/embedding", PartitionSpec(None, "fsdp")),
    (
        r"vision_tower/layers/(attn/qkv|mlp/(gate_proj|up_proj|fc1))/kernel",
        PartitionSpec(None, "fsdp", "tensor"),
    ),
    (
        r"vision_tower/layers/(attn/proj|mlp/(down_proj|fc2))/kernel",
        PartitionSpec(None, "tensor", "fsdp"),
    ),
    (r"vision_tower/.*(bias|scale)", PartitionSpec()),
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
    """Tokens along a side of an attention window; a slot has room for its square."""
    full_layers: tuple[int, ...]
    """Layers that attend to whole images instead of windows."""
    rope: Rope
    """Its two position axes are row and column."""
    gated: bool
    """Whether the layers have RMS norms and gated MLPs (Qwen2.5-VL), or layer norms and plain ones,
    and the patch embedding a bias (Qwen3-VL)."""
    position_side: int = 0
    """Learned positions along a side of the square that is resampled to an image's patches; 0 for
    none."""
    deep_layers: tuple[int, ...] = ()
    """Layers whose outputs the decoder's first layers read beside the last one's, ascending."""

    @property
    def windowed(self) -> bool:
        return len(self.full_layers) < self.num_layers

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
    _check_patches(config, key)
    return QwenVisionConfig(
        **_sizes(config),
        window=config.window_size // config.patch_size // config.spatial_merge_size,
        full_layers=tuple(config.fullatt_block_indexes),
        rope=_axial_rope(config, key),
        gated=True,
    )


SLOT_SIDE = 4
"""Tokens along a side of a slot's square where attention has no windows: pictures leave little of
their last slot empty."""


def read_deep_vision(config: Any, key: str = "vision_config") -> QwenVisionConfig:
    """The tower of a transformers `Qwen3VLVisionConfig`, or of a `Qwen3_5VisionConfig`, which has
    no deep layers.

    Raises:
      ModelError: a switch that is not implemented.
    """
    _check_patches(config, key)
    side = math.isqrt(config.num_position_embeddings)
    if side**2 != config.num_position_embeddings:
        raise ModelError(
            f"{key}.num_position_embeddings is {config.num_position_embeddings}, expected a square"
        )
    deep = tuple(getattr(config, "deepstack_visual_indexes", ()))
    if deep != tuple(sorted(set(deep) & set(range(config.depth)))):
        raise ModelError(
            f"{key}.deepstack_visual_indexes is {list(deep)}, expected numbers of its "
            f"{config.depth} layers, ascending"
        )
    return QwenVisionConfig(
        **_sizes(config),
        window=SLOT_SIDE,
        full_layers=tuple(range(config.depth)),
        rope=_axial_rope(config, key),
        gated=False,
        position_side=side,
        deep_layers=deep,
    )


def _sizes(config: Any) -> dict[str, Any]:
    """The fields that all of these towers name alike."""
    return {
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_layers": config.depth,
        "num_heads": config.num_heads,
        "hidden_act": config.hidden_act,
        "num_channels": config.in_channels,
        "patch_size": config.patch_size,
        "temporal_patch_size": config.temporal_patch_size,
        "merge_size": config.spatial_merge_size,
    }


def _check_patches(config: Any, key: str) -> None:
    expect(config.hidden_act, tuple(ACTIVATIONS), f"{key}.hidden_act")
    for name in ("patch_size", "temporal_patch_size"):
        if not isinstance(getattr(config, name), int):
            raise ModelError(f"{key}.{name} is {getattr(config, name)!r}, expected one number")


def _axial_rope(config: Any, key: str) -> Rope:
    """Half of a head's channels turn by the row, half by the column, by the same frequencies."""
    expect(config.rope_parameters["rope_type"], ("axial",), f"{key}.rope_parameters.rope_type")
    theta, head_dim = config.rope_parameters["rope_theta"], config.hidden_size // config.num_heads
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
        size, wide, act = config.hidden_size, config.intermediate_size, config.hidden_act
        residual_layers = 2 * config.num_layers
        self.norm1 = norm(config, size, rngs)
        self.attn = SelfAttention(config, rngs)
        self.norm2 = norm(config, size, rngs)
        self.mlp: nnx.Module = (
            GatedMlp(size, wide, act, True, residual_layers, rngs)
            if config.gated
            else Mlp(size, wide, act, residual_layers, rngs)
        )

    def __call__(
        self, x: Float[Array, "B S D"], rope: Tables, attention: Attention
    ) -> Float[Array, "B S D"]:
        x = x + self.attn(self.norm1(x), rope, attention)
        return x + self.mlp(self.norm2(x))


def norm(config: QwenVisionConfig, size: int, rngs: nnx.Rngs) -> nnx.Module:
    if config.gated:
        return nnx.RMSNorm(size, epsilon=NORM_EPS, rngs=rngs)
    return layer_norm(size, NORM_EPS, rngs)


class QwenVisionTower(nnx.Module):
    """Patches to features, both in slots."""

    def __init__(self, config: QwenVisionConfig, rngs: nnx.Rngs):
        self.config = config
        size = config.hidden_size
        self.patch_embedding = linear(config.patch_inputs, size, not config.gated, rngs)
        if config.position_side:
            self.position_embedding = nnx.Embed(
                config.position_side**2,
                size,
                embedding_init=nnx.initializers.normal(0.5),  # see `vision.PatchEmbeddings`
                promote_dtype=keep_dtype,
                rngs=rngs,
            )
        self.layers = stack_layers(lambda r: EncoderLayer(config, r), config.num_layers, rngs)

    def __call__(
        self,
        pixels: Float[Array, "B I S inputs"],
        patches: Mapping[str, Shaped[Array, "B I S *n"]],
        remat: str,
    ) -> tuple[Float[Array, "B I S D"], Float[Array, "B L I S D"] | None]:
        """The last layer's output, without a norm, and those of `deep_layers`; every merged square
        is contiguous.

        Args:
          pixels: [B, I, S, C*t*h*w], I slots of S patches.
          patches: what is known of every patch: `places` int32[B, I, S, 2], row and column in its
            image; `frames` int32[B, I, S], which frame of the prompt's images and videos it is of,
            0 for padding, which sees nothing but itself and is not seen; with learned positions
            `grid` float32[B, I, S, 2], where in their square it lies.
          remat: rematerialisation policy, see `layers.rematerialise`.

        Returns:
          ([B, I, S, D], [B, L, I, S, D] or None where there are none).
        """
        config, places, frames = self.config, patches["places"], patches["frames"]
        b, i, s = frames.shape
        x = self.patch_embedding(pixels.astype(self.patch_embedding.kernel.dtype))
        x = constrain_batch(x.reshape(b, i * s, -1))
        if config.position_side:
            x += self._positions(patches["grid"].reshape(b, i * s, 2)).astype(x.dtype)
        rope = rope_tables(places.reshape(b, i * s, 2).swapaxes(1, 2), config.rope)
        side = config.window * config.merge_size
        windows = jnp.concatenate([frames[..., None], places // side], axis=-1)
        graphdef, parameters = nnx.split(self.layers)

        def attention(full: Bool[Array, ""], *qkv: Heads) -> Heads:
            if not config.windowed:
                return attend_frames(frames, *qkv)
            whole, parts = (
                lambda *qkv: attend_frames(frames, *qkv),
                lambda *qkv: attend_windows(windows, *qkv),
            )
            return jax.lax.cond(full, whole, parts, *qkv)

        # What `deep_layers` give is written behind one another; all other layers write to a place
        # of their own that nobody reads. A branch would keep what is written for the backward pass.
        places_of = {layer: place for place, layer in enumerate(config.deep_layers)}
        count = len(config.deep_layers)
        deep = jnp.zeros((b, count + 1, *x.shape[1:]), x.dtype) if count else None

        def body(state: tuple, inputs: tuple) -> tuple[tuple, None]:
            x, deep = state
            parameters, full, place = inputs
            layer = nnx.merge(graphdef, parameters)
            x = constrain_batch(layer(x, rope, functools.partial(attention, full)))
            if deep is not None:
                deep = constrain_batch(jax.lax.dynamic_update_index_in_dim(deep, x, place, 1))
            return (x, deep), None

        full = jnp.array(np.isin(np.arange(config.num_layers), config.full_layers))
        place = jnp.array([places_of.get(layer, count) for layer in range(config.num_layers)])
        inputs = parameters, full, place
        (x, deep), _ = jax.lax.scan(rematerialise(body, remat), (x, deep), inputs)
        if deep is not None:
            deep = deep[:, :count].reshape(b, count, i, s, -1)
        return x.reshape(b, i, s, -1), deep

    def _positions(self, grid: Float[Array, "B S 2"]) -> Float[Array, "B S D"]:
        """The learned positions at places between them, bilinearly, in float32 at least."""
        side, table = self.config.position_side, self.position_embedding.embedding[...]
        if not jax.sharding.get_abstract_mesh().empty:
            table = jax.lax.with_sharding_constraint(table, PartitionSpec())
        first = jnp.floor(grid)
        found = jnp.zeros((), promote(table).dtype)
        for down, right in itertools.product(range(2), repeat=2):
            step = jnp.array([down, right], grid.dtype)
            weight = (1 - jnp.abs(grid - first - step)).prod(axis=-1, keepdims=True)
            row, column = jnp.moveaxis(jnp.minimum(first + step, side - 1).astype(jnp.int32), -1, 0)
            found += table[row * side + column] * weight
        return found


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
