"""The CLIP vision tower."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from mmpo_jax.models.attention import attend
from mmpo_jax.models.config import VisionConfig
from mmpo_jax.models.layers import (
    ACTIVATIONS,
    constrain_batch,
    layer_norm,
    linear,
    rematerialise,
    stack_layers,
)

SHARDING_RULES: tuple[tuple[str, PartitionSpec], ...] = (
    (r"vision_tower/embeddings/class_embedding", PartitionSpec()),
    (r"vision_tower/embeddings/position_embedding/embedding", PartitionSpec(None, "fsdp")),
    (r"vision_tower/embeddings/patch_embedding/kernel", PartitionSpec(None, "fsdp")),
    (
        r"vision_tower/layers/(self_attn/[qkv]_proj|mlp/fc1)/kernel",
        PartitionSpec(None, "fsdp", "tensor"),
    ),
    (
        r"vision_tower/layers/(self_attn/out_proj|mlp/fc2)/kernel",
        PartitionSpec(None, "tensor", "fsdp"),
    ),
    (r"vision_tower/.*/bias|vision_tower/.*/scale", PartitionSpec()),
)


class PatchEmbeddings(nnx.Module):
    """Image patches, a class token in front, and learned positions."""

    def __init__(self, config: VisionConfig, rngs: nnx.Rngs):
        patch_inputs = config.num_channels * config.patch_size**2
        init = nnx.initializers.normal(0.02)
        self.patch_size = config.patch_size
        self.class_embedding = nnx.Param(init(rngs.params(), (config.hidden_size,)))
        self.patch_embedding = linear(patch_inputs, config.hidden_size, False, rngs)
        # As large as what patches differ by. From CLIP's own 0.02, a small model had not begun to
        # tell positions apart after 2,000 steps.
        self.position_embedding = nnx.Embed(
            config.num_patches + 1,
            config.hidden_size,
            embedding_init=nnx.initializers.normal(0.5),
            rngs=rngs,
        )

    def __call__(self, pixels: jax.Array) -> jax.Array:
        """[M, C, H, W] -> [M, 1 + patches, D]."""
        m, c, h, w = pixels.shape
        p = self.patch_size
        # A convolution whose stride is its size is a matrix product over cut-out patches.
        patches = pixels.reshape(m, c, h // p, p, w // p, p).transpose(0, 2, 4, 1, 3, 5)
        patches = self.patch_embedding(patches.reshape(m, -1, c * p * p))
        class_token = jnp.broadcast_to(self.class_embedding[...], (m, 1, patches.shape[-1]))
        tokens = jnp.concatenate([class_token.astype(patches.dtype), patches], axis=1)
        return tokens + self.position_embedding.embedding[...].astype(tokens.dtype)


class SelfAttention(nnx.Module):
    """Bidirectional multi-head attention with biases."""

    def __init__(self, config: VisionConfig, rngs: nnx.Rngs):
        self.num_heads = config.num_heads
        size = config.hidden_size
        self.q_proj = linear(size, size, True, rngs)
        self.k_proj = linear(size, size, True, rngs)
        self.v_proj = linear(size, size, True, rngs)
        self.out_proj = linear(size, size, True, rngs, 2 * config.num_layers)

    def __call__(self, x: jax.Array) -> jax.Array:
        m, s, d = x.shape
        heads = (m, s, self.num_heads, d // self.num_heads)
        query, key, value = (f(x).reshape(heads) for f in (self.q_proj, self.k_proj, self.v_proj))
        scale = (d // self.num_heads) ** -0.5
        attended = attend(query[:, None], [(key, value, None)], scale)
        return self.out_proj(attended.reshape(m, s, d))


class Mlp(nnx.Module):
    def __init__(self, config: VisionConfig, rngs: nnx.Rngs):
        self.act = config.hidden_act
        size, wide = config.hidden_size, config.intermediate_size
        self.fc1 = linear(size, wide, True, rngs)
        self.fc2 = linear(wide, size, True, rngs, 2 * config.num_layers)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fc2(ACTIVATIONS[self.act](self.fc1(x)))


class EncoderLayer(nnx.Module):
    """One pre-norm transformer layer."""

    def __init__(self, config: VisionConfig, rngs: nnx.Rngs):
        self.layer_norm1 = layer_norm(config.hidden_size, config.layer_norm_eps, rngs)
        self.self_attn = SelfAttention(config, rngs)
        self.layer_norm2 = layer_norm(config.hidden_size, config.layer_norm_eps, rngs)
        self.mlp = Mlp(config, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class VisionTower(nnx.Module):
    """CLIP's vision transformer; the parameter names are Hugging Face's (typo included)."""

    def __init__(self, config: VisionConfig, rngs: nnx.Rngs):
        self.embeddings = PatchEmbeddings(config, rngs)
        self.pre_layrnorm = layer_norm(config.hidden_size, config.layer_norm_eps, rngs)
        self.layers = stack_layers(lambda r: EncoderLayer(config, r), config.num_layers, rngs)
        self.post_layernorm = layer_norm(config.hidden_size, config.layer_norm_eps, rngs)

    def __call__(self, pixels: jax.Array, feature_layers: tuple[int, ...], remat: str) -> jax.Array:
        """Hidden states of the chosen layers; layers after the last chosen one are not run.

        Args:
          pixels: [M, C, H, W], preprocessed.
          feature_layers: hidden-state indices, 0 for the embedding, i for the output of layer i.
          remat: rematerialisation policy, see `layers.rematerialise`.

        Returns:
          [M, 1 + patches, D * len(feature_layers)], the class token first.
        """
        x = constrain_batch(self.pre_layrnorm(self.embeddings(pixels)))
        graphdef, parameters = nnx.split(self.layers)
        states = {0: x}
        done = 0
        for stop in sorted(set(feature_layers) - {0}):
            run = jax.tree.map(lambda leaf, lo=done, hi=stop: leaf[lo:hi], parameters)
            x, _ = jax.lax.scan(rematerialise(_layer_body(graphdef), remat), x, run)
            states[stop], done = x, stop
        return jnp.concatenate([states[layer] for layer in feature_layers], axis=-1)


def _layer_body(graphdef: Any):
    def body(x: jax.Array, parameters: Any) -> tuple[jax.Array, None]:
        return constrain_batch(nnx.merge(graphdef, parameters)(x)), None

    return body
