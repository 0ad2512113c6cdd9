"""LLaVA-1.5: vision tower, projector and decoder composed, over shared prompts."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from mmpo_jax.models import decoder, vision
from mmpo_jax.models.attention import shared_prompt_attention
from mmpo_jax.models.batch import Batch
from mmpo_jax.models.config import LlavaConfig
from mmpo_jax.models.layers import ACTIVATIONS, linear

Params = Any
"""A nested dict of arrays, as `nnx.to_pure_dict` gives it."""

SHARDING_RULES: tuple[tuple[str, PartitionSpec], ...] = (
    *vision.SHARDING_RULES,
    (r"multi_modal_projector/linear_1/kernel", PartitionSpec("fsdp", "tensor")),
    (r"multi_modal_projector/linear_2/kernel", PartitionSpec("tensor", "fsdp")),
    (r"multi_modal_projector/linear_[12]/bias", PartitionSpec()),
    *decoder.SHARDING_RULES,
)
"""(regular expression over a parameter's whole path, its PartitionSpec); the first match counts."""


class Projector(nnx.Module):
    """Two dense layers from image features to the decoder's width."""

    def __init__(self, config: LlavaConfig, rngs: nnx.Rngs):
        inputs = config.vision.hidden_size * len(config.feature_layers)
        width, bias = config.decoder.hidden_size, config.projector_bias
        self.act = config.projector_act
        self.linear_1 = linear(inputs, width, bias, rngs)
        self.linear_2 = linear(width, width, bias, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.linear_2(ACTIVATIONS[self.act](self.linear_1(x)))


class Llava(nnx.Module):
    """The whole model; use it through `Model`, which keeps parameters outside."""

    def __init__(self, config: LlavaConfig, rngs: nnx.Rngs):
        self.config = config
        self.vision_tower = vision.VisionTower(config.vision, rngs)
        self.multi_modal_projector = Projector(config, rngs)
        self.language_model = decoder.Decoder(config.decoder, rngs)

    def encode_images(self, pixel_values: jax.Array, remat: str = "none") -> jax.Array:
        """[B, I, C, H, W] -> image features [B, I*N, D] in the decoder's width."""
        b, i = pixel_values.shape[:2]
        dtype = self.vision_tower.embeddings.patch_embedding.kernel.dtype
        pixels = pixel_values.reshape(b * i, *pixel_values.shape[2:]).astype(dtype)
        features = self.vision_tower(pixels, self.config.feature_layers, remat)
        if not self.config.keep_class_token:
            features = features[:, 1:]
        features = self.multi_modal_projector(features)
        return features.reshape(b, -1, features.shape[-1])

    def embed_prompt(self, batch: Batch, remat: str = "none") -> jax.Array:
        """Prompt embeddings [B, P, D], image features in the places of the image tokens."""
        is_image = batch.prompt_ids == self.config.image_token_id
        text = self.language_model.embed_tokens(jnp.where(is_image, 0, batch.prompt_ids))
        if batch.pixel_values.shape[1] == 0:
            return text
        features = self.encode_images(batch.pixel_values, remat)
        index = jnp.clip(jnp.cumsum(is_image, axis=1) - 1, 0, features.shape[1] - 1)
        image = jax.vmap(lambda rows, at: rows[at])(features, index)
        return jnp.where(is_image[..., None], image, text)

    def hidden_states(self, batch: Batch, remat: str = "none") -> tuple[jax.Array, jax.Array]:
        """The decoder's final hidden states of a batch, each prompt run once.

        Returns:
          (last prompt token's [B, D], responses' [B, R, T, D]).
        """
        b, r, t = batch.response_ids.shape
        p = batch.prompt_ids.shape[1]
        lengths = prompt_lengths(batch)
        responses = self.language_model.embed_tokens(batch.response_ids.reshape(b, r * t))
        x = jnp.concatenate([self.embed_prompt(batch, remat), responses], axis=1)
        own = jnp.tile(jnp.arange(t), r)
        positions = jnp.concatenate(
            [jnp.broadcast_to(jnp.arange(p), (b, p)), lengths[:, None] + own], axis=1
        )

        def attend(query, key, value, carry, inputs):
            del inputs
            masks = batch.prompt_mask, batch.response_mask
            return shared_prompt_attention(query, key, value, *masks), carry, None

        x, _, _ = self.language_model(x, positions, attend, remat=remat)
        last = jax.vmap(lambda rows, at: rows[at])(x, lengths - 1)
        return last, x[:, p:].reshape(b, r, t, -1)


def prompt_lengths(batch: Batch) -> jax.Array:
    """int32[B]: real tokens of each prompt."""
    return batch.prompt_mask.sum(axis=1, dtype=jnp.int32)


@dataclasses.dataclass(frozen=True)
class Model:
    """A model without its parameters: hashable, so that `jax.jit` can take it as static."""

    config: LlavaConfig
    graphdef: Any
    rules: tuple[tuple[str, PartitionSpec], ...] = SHARDING_RULES

    @classmethod
    def create(cls, config: LlavaConfig) -> Model:
        abstract = nnx.eval_shape(lambda: Llava(config, nnx.Rngs(0)))
        return cls(config, nnx.split(abstract)[0])

    def bind(self, params: Params) -> Llava:
        """The module with these parameters in it, for use inside a pure function."""
        return nnx.merge(self.graphdef, params)

    def init(self, seed: int) -> Params:
        """Random float32 parameters."""
        module = Llava(self.config, nnx.Rngs(seed))
        return nnx.to_pure_dict(nnx.split(module)[1])

    def abstract_params(self) -> Params:
        """The parameters' shapes, as `init` would make them."""
        return jax.eval_shape(lambda: self.init(0))
