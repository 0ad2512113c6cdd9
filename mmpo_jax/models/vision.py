"""Vision transformers over tiles of one size: CLIP, SigLIP and InternViT."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from mmpo_jax.models.attention import attend
from mmpo_jax.models.config import ModelError, expect
from mmpo_jax.models.layers import (
    ACTIVATIONS,
    Mlp,
    constrain_batch,
    layer_norm,
    rematerialise,
    stack_layers,
)
from mmpo_jax.models.linear import linear

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
    (r"vision_tower/.*/(bias|scale|attention_factor|mlp_factor)", PartitionSpec()),
)


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """A pre-norm vision transformer; sizes are in pixels, tokens or channels."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    image_size: int
    patch_size: int
    num_channels: int
    hidden_act: str
    layer_norm_eps: float
    class_token: bool
    """Whether a learned token stands in front of the patches."""
    patch_bias: bool
    pre_norm: bool
    """Whether the embeddings are normalised (CLIP)."""
    qkv_bias: bool
    qk_norm: bool
    """Whether queries and keys are normalised over all heads together (InternViT-6B)."""
    layer_norm: str
    """"layer_norm" or "rms_norm": the norms of the layers."""
    layer_scale: bool
    """Whether learned factors scale the residual branches (InternViT)."""
    post_norm: str
    """"stored": in the checkpoint, but no feature has passed it; "applied": the last layer's
    features have; "none"."""

    @property
    def side(self) -> int:
        """Patches along an edge; pixels that fill none are left out."""
        return self.image_size // self.patch_size

    @property
    def num_tokens(self) -> int:
        return self.side**2 + int(self.class_token)

    @property
    def patch_kernel_shape(self) -> tuple[int, int, int, int]:
        """Shape of the patch embedding's kernel in files, a convolution: [D, C, h, w]."""
        return self.hidden_size, self.num_channels, self.patch_size, self.patch_size

    @property
    def pixel_shape(self) -> tuple[int, int, int]:
        return self.num_channels, self.image_size, self.image_size


def read_vision(config: Any, key: str = "vision_config") -> VisionConfig:
    """The tower of a transformers vision config.

    Args:
      config: a `transformers` config of CLIP, SigLIP or InternViT.
      key: how error messages call the config.

    Raises:
      ModelError: an architecture or a switch that is not implemented.
    """
    kind = config.model_type
    expect(
        kind, ("clip_vision_model", "siglip_vision_model", "internvl_vision"), f"{key}.model_type"
    )
    expect(config.hidden_act, tuple(ACTIVATIONS), f"{key}.hidden_act")
    internvl = kind == "internvl_vision"
    if kind == "siglip_vision_model":
        expect(getattr(config, "vision_use_head", True), (False,), f"{key}.vision_use_head")
    if internvl:
        expect(config.use_mask_token, (False,), f"{key}.use_mask_token")
        expect(
            config.use_absolute_position_embeddings,
            (True,),
            f"{key}.use_absolute_position_embeddings",
        )
        expect(config.norm_type, ("layer_norm", "rms_norm"), f"{key}.norm_type")
    size, patch = (
        _square(config.image_size, f"{key}.image_size"),
        _square(config.patch_size, f"{key}.patch_size"),
    )
    if size % patch and kind == "clip_vision_model":
        raise ModelError(f"{key}.image_size {size} is no multiple of its patch_size {patch}")
    return VisionConfig(
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        image_size=size,
        patch_size=patch,
        num_channels=config.num_channels,
        hidden_act=config.hidden_act,
        layer_norm_eps=config.layer_norm_eps,
        class_token=kind != "siglip_vision_model",
        patch_bias=kind != "clip_vision_model",
        pre_norm=kind == "clip_vision_model",
        qkv_bias=config.attention_bias if internvl else True,
        qk_norm=internvl and config.use_qk_norm,
        layer_norm=config.norm_type if internvl else "layer_norm",
        layer_scale=internvl,
        post_norm=("none" if config.use_mean_pooling else "applied") if internvl else "stored",
    )


def _square(size: Any, key: str) -> int:
    sides = set(size) if isinstance(size, (list, tuple)) else {size}
    if len(sides) != 1:
        raise ModelError(f"{key} is {size!r}; this version implements squares")
    return int(sides.pop())


class PatchEmbeddings(nnx.Module):
    """Image patches, a class token in front where the tower has one, and learned positions."""

    def __init__(self, config: VisionConfig, rngs: nnx.Rngs):
        patch_inputs = config.num_channels * config.patch_size**2
        self.patch_size = config.patch_size
        self.has_class_token = config.class_token
        if config.class_token:
            init = nnx.initializers.normal(0.02)
            self.class_embedding = nnx.Param(init(rngs.params(), (config.hidden_size,)))
        self.patch_embedding = linear(patch_inputs, config.hidden_size, config.patch_bias, rngs)
        # As large as what patches differ by. From CLIP's own 0.02, a small model had not begun to
        # tell positions apart after 2,000 steps.
        self.position_embedding = nnx.Embed(
            config.num_tokens,
            config.hidden_size,
            embedding_init=nnx.initializers.normal(0.5),
            rngs=rngs,
        )

    def __call__(self, pixels: Float[Array, "M C H W"]) -> Float[Array, "M S D"]:
        """[M, C, H, W] -> [M, tokens, D]; pixels that fill no patch are left out."""
        m, c, h, w = pixels.shape
        p = self.patch_size
        pixels = pixels[:, :, : h // p * p, : w // p * p]
        # A convolution whose stride is its size is a matrix product over cut-out patches.
        patches = pixels.reshape(m, c, h // p, p, w // p, p).transpose(0, 2, 4, 1, 3, 5)
        tokens = self.patch_embedding(patches.reshape(m, -1, c * p * p))
        if self.has_class_token:
            first = jnp.broadcast_to(self.class_embedding[...], (m, 1, tokens.shape[-1]))
            tokens = jnp.concatenate([first.astype(tokens.dtype), tokens], axis=1)
        return tokens + self.position_embedding.embedding[...].astype(tokens.dtype)


class SelfAttention(nnx.Module):
    """Bidirectional multi-head attention."""

    def __init__(self, config: VisionConfig, rngs: nnx.Rngs):
        self.num_heads = config.num_heads
        size = config.hidden_size
        self.q_proj = linear(size, size, config.qkv_bias, rngs)
        self.k_proj = linear(size, size, config.qkv_bias, rngs)
        self.v_proj = linear(size, size, config.qkv_bias, rngs)
        self.out_proj = linear(size, size, True, rngs, 2 * config.num_layers)
        self.qk_norm = config.qk_norm
        if config.qk_norm:
            self.q_norm = nnx.RMSNorm(size, epsilon=1e-6, rngs=rngs)
            self.k_norm = nnx.RMSNorm(size, epsilon=1e-6, rngs=rngs)

    def __call__(self, x: Float[Array, "M S D"]) -> Float[Array, "M S D"]:
        m, s, d = x.shape
        query, key, value = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.qk_norm:
            query, key = self.q_norm(query), self.k_norm(key)
        heads = (m, s, self.num_heads, d // self.num_heads)
        query, key, value = (y.reshape(heads) for y in (query, key, value))
        scale = (d // self.num_heads) ** -0.5
        attended = attend(query[:, None], [(key, value, None)], scale)
        return self.out_proj(attended.reshape(m, s, d))


class EncoderLayer(nnx.Module):
    """One pre-norm transformer layer."""

    def __init__(self, config: VisionConfig, rngs: nnx.Rngs):
        self.layer_norm1 = _norm(config, rngs)
        self.self_attn = SelfAttention(config, rngs)
        self.layer_norm2 = _norm(config, rngs)
        self.mlp = Mlp(
            config.hidden_size,
            config.intermediate_size,
            config.hidden_act,
            2 * config.num_layers,
            rngs,
        )
        self.scaled = config.layer_scale
        if self.scaled:
            self.attention_factor = nnx.Param(jnp.full(config.hidden_size, 0.1))
            self.mlp_factor = nnx.Param(jnp.full(config.hidden_size, 0.1))

    def __call__(self, x: Float[Array, "M S D"]) -> Float[Array, "M S D"]:
        attended = self.self_attn(self.layer_norm1(x))
        x = x + (attended * self.attention_factor[...] if self.scaled else attended)
        made = self.mlp(self.layer_norm2(x))
        return x + (made * self.mlp_factor[...] if self.scaled else made)


def _norm(config: VisionConfig, rngs: nnx.Rngs) -> nnx.Module:
    if config.layer_norm == "rms_norm":
        return nnx.RMSNorm(config.hidden_size, epsilon=config.layer_norm_eps, rngs=rngs)
    return layer_norm(config.hidden_size, config.layer_norm_eps, rngs)


class VisionTower(nnx.Module):
    """A vision transformer; the parameter names are CLIP's (typo included)."""

    def __init__(self, config: VisionConfig, rngs: nnx.Rngs):
        size, epsilon = config.hidden_size, config.layer_norm_eps
        self.embeddings = PatchEmbeddings(config, rngs)
        self.pre_norm, self.post_norm = config.pre_norm, config.post_norm
        if config.pre_norm:
            self.pre_layrnorm = layer_norm(size, epsilon, rngs)
        self.layers = stack_layers(lambda r: EncoderLayer(config, r), config.num_layers, rngs)
        if config.post_norm != "none":
            self.post_layernorm = layer_norm(size, epsilon, rngs)

    def __call__(
        self, pixels: Float[Array, "M C H W"], feature_layers: tuple[int, ...], remat: str
    ) -> Float[Array, "M S D"]:
        """Hidden states of the chosen layers; layers after the last chosen one are not run.

        Args:
          pixels: [M, C, H, W], preprocessed.
          feature_layers: hidden-state indices, 0 for the embedding, i for the output of layer i.
          remat: rematerialisation policy, see `layers.rematerialise`.

        Returns:
          [M, tokens, D * len(feature_layers)], the class token first.
        """
        x = self.embeddings(pixels.astype(self.embeddings.patch_embedding.kernel.dtype))
        x = constrain_batch(self.pre_layrnorm(x) if self.pre_norm else x)
        graphdef, parameters = nnx.split(self.layers)
        depth = jax.tree.leaves(parameters)[0].shape[0]
        states = {0: x}
        done = 0
        for stop in sorted(set(feature_layers) - {0}):
            run = jax.tree.map(lambda leaf, lo=done, hi=stop: leaf[lo:hi], parameters)
            x, _ = jax.lax.scan(rematerialise(_layer_body(graphdef), remat), x, run)
            states[stop], done = x, stop
        if self.post_norm == "applied" and depth in states:
            states[depth] = self.post_layernorm(states[depth])
        return jnp.concatenate([states[layer] for layer in feature_layers], axis=-1)


def _layer_body(graphdef: Any):
    def body(x: Float[Array, "M S D"], parameters: Any) -> tuple[Float[Array, "M S D"], None]:
        return constrain_batch(nnx.merge(graphdef, parameters)(x)), None

    return body
