"""LLaVA-1.5: features of chosen layers of a vision tower, a two-layer projector, a decoder."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from flax import nnx

from mmpo_jax.models import decoder, projector, vision
from mmpo_jax.models.config import ModelConfig, ModelError, expect, read_decoder
from mmpo_jax.models.family import Family, Images, Size, pixels_of_each
from mmpo_jax.models.layers import ACTIVATIONS
from mmpo_jax.models.layout import Layout
from mmpo_jax.models.tiles import TileModel
from mmpo_jax.models.vision import VisionConfig, read_vision


@dataclasses.dataclass(frozen=True)
class LlavaConfig(ModelConfig):
    """LLaVA's own switches."""

    vision: VisionConfig
    image_token_id: int
    feature_layers: tuple[int, ...]
    """Indices into the tower's hidden states: 0 is the embedding, i the output of layer i."""
    keep_first: bool
    """Whether the tower's first token, CLIP's class token, is a feature too."""
    projector_act: str
    projector_bias: bool

    @property
    def num_image_tokens(self) -> int:
        """N: how many features the tower makes of one tile."""
        return self.vision.num_tokens - int(not self.keep_first)


def read_config(config: Any) -> LlavaConfig:
    return LlavaConfig(**llava_fields(config))


def llava_fields(config: Any) -> dict[str, Any]:
    """The fields of `LlavaConfig` from a transformers config of LLaVA-1.5 or its successors.

    Raises:
      ModelError: an architecture or a switch that is not implemented.
    """
    tower = read_vision(config.vision_config)
    expect(config.projector_hidden_act, tuple(ACTIVATIONS), "projector_hidden_act")
    strategy = config.vision_feature_select_strategy
    expect(strategy, ("default", "full"), "vision_feature_select_strategy")
    return {
        "family": config.model_type,
        "decoder": read_decoder(config.text_config, config.tie_word_embeddings),
        "vision": tower,
        "image_token_id": config.image_token_id,
        "feature_layers": _feature_layers(config.vision_feature_layer, tower.num_layers),
        "keep_first": strategy == "full",
        "projector_act": config.projector_hidden_act,
        "projector_bias": config.multimodal_projector_bias,
    }


def _feature_layers(selected: int | list[int], num_layers: int) -> tuple[int, ...]:
    """Non-negative hidden-state indices; negative ones count from the last layer's output."""
    layers = [selected] if isinstance(selected, int) else list(selected)
    resolved = tuple(layer + num_layers + 1 if layer < 0 else layer for layer in layers)
    if any(not 0 <= layer <= num_layers for layer in resolved):
        raise ModelError(f"vision_feature_layer {selected} is outside the {num_layers} layers")
    return resolved


class Llava(TileModel):
    """A tile's features are those of chosen layers side by side."""

    def __init__(self, config: LlavaConfig, rngs: nnx.Rngs):
        super().__init__(config, rngs)
        self.feature_layers = config.feature_layers
        self.keep_first = config.keep_first
        self.multi_modal_projector = projector.Projector(
            config.vision.hidden_size * len(config.feature_layers),
            config.decoder.hidden_size,
            config.projector_act,
            config.projector_bias,
            rngs,
        )

    def tile_features(self, pixels, remat):
        features = self.vision_tower(pixels, self.feature_layers, remat)
        return features[:, int(not self.keep_first) :]


def layouts(config: LlavaConfig, processor: Any, sizes: Sequence[Size]) -> list[Layout]:
    del processor
    return [Layout.plain(config.image_token_id, config.num_image_tokens) for _ in sizes]


def pixels(config: LlavaConfig, processor: Any, images: Sequence[Any]) -> list[np.ndarray]:
    del config
    return pixels_of_each(processor, images)


READ_KEYS = (
    (r"^model\.(vision_tower|multi_modal_projector|image_newline)", r"\1"),
    (r"^model\.language_model\.", "language_model."),
    (r"^lm_head\.", "language_model.lm_head."),
    (r"^language_model\.model\.", "language_model."),
    (r"^vision_tower\.vision_model\.", "vision_tower."),
    (r"^vision_tower\.encoder\.", "vision_tower."),
)
WRITE_KEYS = (
    (r"^vision_tower\.layers\.", "vision_tower.encoder.layers."),
    (r"^vision_tower\.", "vision_tower.vision_model."),
    (r"^language_model\.(?!lm_head)", "language_model.model."),
)


def tensor_shapes(config: LlavaConfig) -> dict[str, tuple[int, ...]]:
    kernel = config.vision.patch_kernel_shape
    return {"vision_tower.vision_model.embeddings.patch_embedding.weight": kernel}


FAMILY = Family(
    model_types=("llava",),
    read_config=read_config,
    module=Llava,
    rules=(*vision.SHARDING_RULES, *projector.SHARDING_RULES, *decoder.SHARDING_RULES),
    read_keys=READ_KEYS,
    write_keys=WRITE_KEYS,
    images=Images(
        processors=("CLIPImageProcessor", "SiglipImageProcessor", "LlavaImageProcessor"),
        placeholders=lambda config: (config.image_token_id,),
        slot_shape=lambda config: config.vision.pixel_shape,
        layouts=layouts,
        pixels=pixels,
        sized=False,
    ),
    tensor_shapes=tensor_shapes,
)
