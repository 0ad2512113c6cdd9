"""The vision transformer of Gemma 4: patches of pictures of any shape, averaged in squares."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from mmpo_jax.models.attention import attend
from mmpo_jax.models.config import expect
from mmpo_jax.models.layers import (
    ACTIVATIONS,
    GatedMlp,
    constrain_batch,
    promote,
    rematerialise,
    rms_norm,
    stack_layers,
    unit_norm,
)
from mmpo_jax.models.linear import Linear, linear
from mmpo_jax.models.rope import Rope, Tables, rope_tables, rotate
from mmpo_jax.models.vision_squares import places_of

SHARDING_RULES: tuple[tuple[str, PartitionSpec], ...] = (
    (r"vision_tower/patch_embedder/input_proj/kernel", PartitionSpec(None, "fsdp")),
    (
        r"vision_tower/patch_embedder/position_embedding_table",
        PartitionSpec(None, None, "fsdp"),
    ),
    (
        r"vision_tower/layers/(self_attn/[qkv]_proj|mlp/(gate|up)_proj)/kernel",
        PartitionSpec(None, "fsdp", "tensor"),
    ),
    (
        r"vision_tower/layers/(self_attn/o_proj|mlp/down_proj)/kernel",
        PartitionSpec(None, "tensor", "fsdp"),
    ),
    (
        r"vision_tower/.*/(scale|(in|out)put_(min|max))|vision_tower/std_(bias|scale)",
        PartitionSpec(),
    ),
)
Ropes = tuple[Tables, Tables]
"""By the column and by the row."""

QUERIES = 640
"""Patches whose scores with all others of an image are held at once, at most."""
SOFT_TOKENS = 280
"""Features of an image at most, where its processor does not say otherwise."""


@dataclasses.dataclass(frozen=True)
class GemmaVisionConfig:
    """A vision transformer with norms before and behind attention and MLP."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_act: str
    rms_norm_eps: float
    patch_size: int
    positions: int
    """Columns and rows of patches that there are learned positions for."""
    pool: int
    """Patches along the edge of a square that becomes one feature."""
    clipped: bool
    """Whether inputs and outputs of dense layers are kept between stored limits."""
    standardize: bool
    """Whether features are standardised by a stored mean and deviation."""
    rope: Rope
    """For half of a head's channels: one half turns by the column, the other by the row."""

    @property
    def patch_inputs(self) -> int:
        return 3 * self.patch_size**2

    @property
    def slot_patches(self) -> int:
        """Patches of an image at most, where its processor does not say otherwise."""
        return SOFT_TOKENS * self.pool**2


def read_vision(config: Any, key: str = "vision_config") -> GemmaVisionConfig:
    """The tower of a transformers `Gemma4VisionConfig`.

    Raises:
      ModelError: a switch that is not implemented.
    """
    expect(config.hidden_activation, tuple(ACTIVATIONS), f"{key}.hidden_activation")
    rope = config.rope_parameters
    expect(rope["rope_type"], ("axial",), f"{key}.rope_parameters.rope_type")
    half = config.head_dim // 2
    exponents = np.arange(0, half, 2, dtype=np.float32) / np.float32(half)
    frequencies = 1 / np.float32(rope["rope_theta"]) ** exponents
    return GemmaVisionConfig(
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        hidden_act=config.hidden_activation,
        rms_norm_eps=config.rms_norm_eps,
        patch_size=config.patch_size,
        positions=config.position_embedding_size,
        pool=config.pooling_kernel_size,
        clipped=config.use_clipped_linears,
        standardize=config.standardize,
        rope=Rope(tuple(map(float, frequencies))),
    )


class ClippedLinear(Linear):
    """A dense layer whose inputs and outputs are kept between limits that nothing trains."""

    def __init__(self, *sizes: int, **options: Any):
        super().__init__(*sizes, **options)
        far = jnp.finfo(jnp.float32).max
        self.input_min = nnx.Param(jnp.full(1, -far))
        self.input_max = nnx.Param(jnp.full(1, far))
        self.output_min = nnx.Param(jnp.full(1, -far))
        self.output_max = nnx.Param(jnp.full(1, far))

    def __call__(self, x: Float[Array, "*b D"], out_sharding: Any = None) -> Float[Array, "*b F"]:
        x = jnp.clip(x, self.input_min[...], self.input_max[...])
        y = super().__call__(x, out_sharding)
        return jnp.clip(y, self.output_min[...], self.output_max[...])


def kind_of(config: GemmaVisionConfig) -> type[Linear]:
    """Of the dense layers of attention and MLPs."""
    return ClippedLinear if config.clipped else Linear


class PatchEmbedder(nnx.Module):
    """Patches, and a learned vector for the column and the row of each."""

    def __init__(self, config: GemmaVisionConfig, rngs: nnx.Rngs):
        size = config.hidden_size
        self.input_proj = linear(config.patch_inputs, size, False, rngs)
        init = nnx.initializers.normal(0.5)  # see vision.PatchEmbeddings
        table = init(rngs.params(), (2, config.positions, size))
        self.position_embedding_table = nnx.Param(table)

    def __call__(
        self, pixels: Float[Array, "M S inputs"], places: Int[Array, "M S 2"]
    ) -> Float[Array, "M S D"]:
        """Patches [M, S, p*p*C] of pixels from 0 to 1, and int32[M, S, 2], column and row."""
        x = self.input_proj((2 * (pixels - 0.5)).astype(self.input_proj.kernel.dtype))
        table = self.position_embedding_table[...].astype(x.dtype)
        return x + table[0][places[..., 0]] + table[1][places[..., 1]]


class SelfAttention(nnx.Module):
    """Attention of the patches of a picture; queries, keys and values are normalised per head."""

    def __init__(self, config: GemmaVisionConfig, rngs: nnx.Rngs):
        self.head_dim, self.epsilon = config.head_dim, config.rms_norm_eps
        size, queries = config.hidden_size, config.num_heads * config.head_dim
        keys = config.num_kv_heads * config.head_dim
        kind = kind_of(config)
        self.q_proj = linear(size, queries, False, rngs, kind=kind)
        self.k_proj = linear(size, keys, False, rngs, kind=kind)
        self.v_proj = linear(size, keys, False, rngs, kind=kind)
        self.o_proj = linear(queries, size, False, rngs, 2 * config.num_layers, kind)
        self.q_norm = rms_norm(config.head_dim, config.rms_norm_eps, False, rngs)
        self.k_norm = rms_norm(config.head_dim, config.rms_norm_eps, False, rngs)

    def __call__(
        self, x: Float[Array, "M S D"], ropes: Ropes, pictures: Int[Array, "M S"]
    ) -> Float[Array, "M S D"]:
        heads = (*x.shape[:2], -1, self.head_dim)
        query, key, value = (f(x).reshape(heads) for f in (self.q_proj, self.k_proj, self.v_proj))
        query, key = _turned(self.q_norm(query), ropes), _turned(self.k_norm(key), ropes)
        attended = attend_image(query, key, unit_norm(value, self.epsilon), pictures)
        return self.o_proj(attended.reshape(*x.shape[:2], -1))


def _turned(x: Float[Array, "M S H d"], ropes: Ropes) -> Float[Array, "M S H d"]:
    """Rotated: the first half of the channels by the column, the second by the row."""
    halves = zip(jnp.split(x, 2, axis=-1), ropes, strict=True)
    return jnp.concatenate([rotate(half, rope) for half, rope in halves], axis=-1)


def attend_image(
    query: Float[Array, "M S H d"],
    key: Float[Array, "M S K d"],
    value: Float[Array, "M S K d"],
    pictures: Int[Array, "M S"],
) -> Float[Array, "M S H d"]:
    """Attention within every picture of a slot, a few hundred queries at a time; scores are
    products as they are.

    Args:
      query, key, value: of the patches of slots.
      pictures: int32[M, S], the number of each patch's picture; -1 for padding.
    """
    s = query.shape[1]
    steps = next(n for n in range(1, s + 1) if s % n == 0 and s // n <= QUERIES)

    def block(part: tuple[jax.Array, jax.Array]) -> jax.Array:
        query, own = part
        same = own[:, None, :, None] == pictures[:, None, None]
        return attend(query[:, None], [(key, value, same)], 1.0)[:, 0]

    if steps == 1:
        return block((query, pictures))

    def split(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x.reshape(len(x), steps, s // steps, *x.shape[2:]), 1, 0)

    attended = jax.lax.map(block, (split(query), split(pictures)))
    return jnp.moveaxis(attended, 0, 1).reshape(query.shape)


class EncoderLayer(nnx.Module):
    """One layer, normalised before and behind its two parts."""

    def __init__(self, config: GemmaVisionConfig, rngs: nnx.Rngs):
        size, epsilon = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = rms_norm(size, epsilon, False, rngs)
        self.self_attn = SelfAttention(config, rngs)
        self.post_attention_layernorm = rms_norm(size, epsilon, False, rngs)
        self.pre_feedforward_layernorm = rms_norm(size, epsilon, False, rngs)
        self.mlp = GatedMlp(
            size,
            config.intermediate_size,
            config.hidden_act,
            False,
            2 * config.num_layers,
            rngs,
            kind_of(config),
        )
        self.post_feedforward_layernorm = rms_norm(size, epsilon, False, rngs)

    def __call__(
        self, x: Float[Array, "M S D"], ropes: Ropes, pictures: Int[Array, "M S"]
    ) -> Float[Array, "M S D"]:
        attended = self.self_attn(self.input_layernorm(x), ropes, pictures)
        x = x + self.post_attention_layernorm(attended)
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))


class GemmaVisionTower(nnx.Module):
    """Patches of pictures to features of squares of them."""

    def __init__(self, config: GemmaVisionConfig, rngs: nnx.Rngs):
        self.config = config
        self.patch_embedder = PatchEmbedder(config, rngs)
        self.layers = stack_layers(lambda r: EncoderLayer(config, r), config.num_layers, rngs)
        if config.standardize:
            self.std_bias = nnx.Param(jnp.zeros(config.hidden_size))
            self.std_scale = nnx.Param(jnp.ones(config.hidden_size))

    def __call__(
        self, pixels: Float[Array, "M S inputs"], grid: Int[Array, "M 3"], remat: str
    ) -> Float[Array, "M N D"]:
        """Features of every slot, those of its pictures first.

        Args:
          pixels: [M, S, p*p*C], pictures of one shape behind one another, each line by line, from 0
            to 1, padded with anything.
          grid: int32[M, 3], columns and rows of squares of `pool` patches, and how many pictures.
          remat: rematerialisation policy, see `layers.rematerialise`.

        Returns:
          [M, S / pool^2, D].
        """
        k = self.config.pool
        picture, place = places_of(pixels.shape[1], k * grid[:, :1], k * grid[:, 1:2])
        real = picture < grid[:, 2:]
        place = jnp.where(real[..., None], place, 0)
        x = constrain_batch(self.patch_embedder(pixels, place))
        ropes = tuple(rope_tables(place[:, None, :, at], self.config.rope) for at in (0, 1))
        pictures = jnp.where(real, picture, -1)
        graphdef, parameters = nnx.split(self.layers)

        def body(x: jax.Array, parameters: Any) -> tuple[jax.Array, None]:
            return constrain_batch(nnx.merge(graphdef, parameters)(x, ropes, pictures)), None

        x, _ = jax.lax.scan(rematerialise(body, remat), x, parameters)
        return self._averaged(jnp.where(real[..., None], x, 0), grid)

    def _averaged(self, x: Float[Array, "M S D"], grid: Int[Array, "M 3"]) -> Float[Array, "M N D"]:
        """Averages of squares, line by line, times the root of the width, standardised."""
        k = self.config.pool
        columns, rows = k * grid[:, :1], k * grid[:, 1:2]
        picture, place = places_of(x.shape[1] // k**2, grid[:, :1], grid[:, 1:2])
        corner = picture * rows * columns + k * (place[..., 1] * columns + place[..., 0])
        within = jnp.arange(k)
        at = corner[..., None, None] + within[:, None] * columns[..., None, None] + within
        at = jnp.minimum(at.reshape(len(x), -1), x.shape[1] - 1)
        squares = jnp.take_along_axis(x, at[..., None], axis=1)
        wide = promote(squares.reshape(*place.shape[:2], k**2, -1))
        made = wide.mean(axis=2) * math.sqrt(self.config.hidden_size)
        if self.config.standardize:
            made = (made - promote(self.std_bias[...])) * promote(self.std_scale[...])
        return made.astype(x.dtype)
