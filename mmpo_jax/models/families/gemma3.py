"""Gemma 3: SigLIP over one tile of an image, averaged squares of patches, a norm and a matrix.

Tokens of an image see one another, in all layers (`AttentionConfig.sees_images`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from mmpo_jax.models import decoder, vision
from mmpo_jax.models.config import ModelConfig, ModelError, expect
from mmpo_jax.models.families import llava
from mmpo_jax.models.families.gemma import read_gemma
from mmpo_jax.models.family import Family, Images, Size
from mmpo_jax.models.layers import rms_norm
from mmpo_jax.models.layout import Layout
from mmpo_jax.models.linear import matmul
from mmpo_jax.models.vision import VisionConfig, read_vision
from mmpo_jax.models.vlm import VisionLanguageModel


@dataclasses.dataclass(frozen=True)
class Gemma3Config(ModelConfig):
    """Gemma 3's own switches."""

    vision: VisionConfig
    image_token_id: int
    num_image_tokens: int
    """N: how many features an image has; a square number."""

    @property
    def feature_layer(self) -> int:
        """Index into the tower's hidden states: the last."""
        return self.vision.num_layers


def read_config(config: Any) -> Gemma3Config:
    """
    Raises:
      ModelError: a switch that is not implemented, or parts that do not fit together.
    """
    tower = dataclasses.replace(read_vision(config.vision_config), post_norm="applied")
    count = config.mm_tokens_per_image
    side = math.isqrt(count)
    if side**2 != count or tower.side % side:
        raise ModelError(
            f"mm_tokens_per_image is {count}, expected a square whose side divides the "
            f"{tower.side} patches of an edge"
        )
    # transformers' model with images does not read this limit.
    limit = config.text_config.final_logit_softcapping
    expect(limit, (None,), "text_config.final_logit_softcapping")
    return Gemma3Config(
        family=config.model_type,
        decoder=read_gemma(config.text_config, config.tie_word_embeddings, sees_images=True),
        vision=tower,
        image_token_id=config.image_token_id,
        num_image_tokens=count,
    )


class Gemma3Projector(nnx.Module):
    """Averages of squares of patches, normalised, in the decoder's width."""

    def __init__(self, config: Gemma3Config, rngs: nnx.Rngs):
        inputs, outputs = config.vision.hidden_size, config.decoder.hidden_size
        self.side = math.isqrt(config.num_image_tokens)
        self.mm_soft_emb_norm = rms_norm(inputs, config.vision.layer_norm_eps, True, rngs)
        init = nnx.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")
        self.mm_input_projection_weight = nnx.Param(init(rngs.params(), (inputs, outputs)))

    def __call__(self, x: Float[Array, "M S D"]) -> Float[Array, "M N F"]:
        m, count, d = x.shape
        k = math.isqrt(count) // self.side
        squares = x.reshape(m, self.side, k, self.side, k, d)
        pooled = squares.mean(axis=(2, 4)).reshape(m, -1, d)
        return matmul(self.mm_soft_emb_norm(pooled), self.mm_input_projection_weight[...])


class Gemma3(VisionLanguageModel):
    """Every slot of a prompt is an image [C, H, W]."""

    def __init__(self, config: Gemma3Config, rngs: nnx.Rngs):
        super().__init__(config, rngs)
        self.feature_layer, self.tokens = config.feature_layer, config.num_image_tokens
        self.vision_tower = vision.VisionTower(config.vision, rngs)
        self.multi_modal_projector = Gemma3Projector(config, rngs)

    def image_tokens(self, batch):
        return self.tokens

    def image_features(self, batch, remat):
        b, i = batch.pixel_values.shape[:2]
        pixels = batch.pixel_values.reshape(b * i, *batch.pixel_values.shape[2:])
        features = self.vision_tower(pixels, (self.feature_layer,), remat)
        features = self.multi_modal_projector(features)
        return features.reshape(b, -1, features.shape[-1])


def layouts(config: Gemma3Config, processor: Any, sizes: Sequence[Size]) -> list[Layout]:
    del processor
    return [Layout.plain(config.image_token_id, config.num_image_tokens) for _ in sizes]


def check_processor(config: Gemma3Config, processor: Any) -> None:
    """
    Raises:
      ModelError: it cuts images into crops.
    """
    del config
    expect(bool(processor.do_pan_and_scan), (False,), "preprocessor_config.json: do_pan_and_scan")


def spelled(tokenizer: Any) -> tuple[str, str]:
    """What the chat template writes for an image, and what stands there for the tokenizer."""
    begin, end = tokenizer.boi_token, tokenizer.eoi_token
    return begin, f"\n\n{begin}{tokenizer.image_token}{end}\n\n"


FAMILY = Family(
    model_types=("gemma3",),
    read_config=read_config,
    module=Gemma3,
    rules=(
        *vision.SHARDING_RULES,
        (r"multi_modal_projector/mm_input_projection_weight", PartitionSpec("fsdp", "tensor")),
        (r"multi_modal_projector/mm_soft_emb_norm/scale", PartitionSpec()),
        *decoder.SHARDING_RULES,
    ),
    read_keys=llava.READ_KEYS,
    write_keys=llava.WRITE_KEYS,
    images=Images(
        processors=("Gemma3ImageProcessor",),
        placeholders=lambda config: (config.image_token_id,),
        slot_shape=lambda config: config.vision.pixel_shape,
        layouts=layouts,
        pixels=llava.pixels,
        sized=False,
        spelled=spelled,
        check=check_processor,
    ),
    tensor_shapes=llava.tensor_shapes,
)
