"""Gemma 4, 12B: no vision transformer. Squares of pixels are normalised, multiplied by a matrix and
told where they are; the decoder is Gemma 4's.

Tokens of an image see one another in all layers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import transformers
from flax import nnx
from jax.sharding import PartitionSpec

from mmpo_jax.models import decoder, gemma_media, torch_resize, vision_squares
from mmpo_jax.models.config import ModelError
from mmpo_jax.models.families import gemma4
from mmpo_jax.models.family import Images
from mmpo_jax.models.vision_gemma import SOFT_TOKENS
from mmpo_jax.models.vision_squares import SquareEmbedder, SquaresConfig
from mmpo_jax.models.vlm import VisionLanguageModel


@dataclasses.dataclass(frozen=True)
class Gemma4UnifiedConfig(gemma_media.GemmaMediaConfig):
    """The 12B's own switches."""

    vision: SquaresConfig


def read_config(config: Any) -> Gemma4UnifiedConfig:
    """
    Raises:
      ModelError: a switch that is not implemented, or parts that do not fit together.
    """
    vision = config.vision_config
    if vision is None:
        raise ModelError("vision_config is missing; this version implements Gemma 4 with images")
    if vision.output_proj_dims != vision.mm_embed_dim:
        raise ModelError(
            f"vision_config.output_proj_dims is {vision.output_proj_dims}, and mm_embed_dim "
            f"{vision.mm_embed_dim}"
        )
    text = config.text_config
    return Gemma4UnifiedConfig(
        family=config.model_type,
        decoder=gemma4.read_gemma4(text, config.tie_word_embeddings, image_layers="all"),
        vision=SquaresConfig(
            patch_size=vision.patch_size,
            pool=vision.pooling_kernel_size,
            hidden_size=vision.mm_embed_dim,
            positions=vision.mm_posemb_size,
            rms_norm_eps=vision.rms_norm_eps,
        ),
        image_token_id=config.image_token_id,
        video_token_id=config.video_token_id,
    )


class Gemma4Unified(VisionLanguageModel):
    """Every slot of a prompt is an image or some frames, their squares line by line."""

    def __init__(self, config: Gemma4UnifiedConfig, rngs: nnx.Rngs):
        super().__init__(config, rngs)
        vision = config.vision
        self.vision_tower = SquareEmbedder(vision, rngs)
        self.multi_modal_projector = gemma4.Embedder(
            vision.hidden_size, config.decoder.hidden_size, vision.rms_norm_eps, rngs
        )

    def image_tokens(self, batch):
        return batch.pixel_values.shape[2]

    def image_features(self, batch, remat):
        del remat
        b, i = batch.pixel_values.shape[:2]
        pixels = batch.pixel_values.reshape(b * i, *batch.pixel_values.shape[2:])
        features = self.vision_tower(pixels, batch.patches["grid"].reshape(b * i, 3))
        features = self.multi_modal_projector(features)
        return features.reshape(b, -1, features.shape[-1])


class Gemma4UnifiedImageProcessorPil(transformers.Gemma4ImageProcessorPil):
    """transformers' `Gemma4UnifiedImageProcessor`, which needs torchvision: patches of an image,
    resized as torch does it."""

    def aspect_ratio_preserving_resize(
        self,
        image: np.ndarray,
        patch_size: int,
        max_patches: int,
        pooling_kernel_size: int,
        resample: Any,
    ) -> np.ndarray:
        """uint8[C, h, w] of uint8[C, H, W]."""
        edge, tokens = pooling_kernel_size * patch_size, max_patches // pooling_kernel_size**2
        _, height, width = image.shape
        columns, rows = gemma_media.grid_of(edge, tokens, (height, width))
        return torch_resize.resize(image, (rows * edge, columns * edge), resample)

    def rescale(self, image: np.ndarray, scale: float, *_: Any, **__: Any) -> np.ndarray:
        """float32, by a factor in float32."""
        return image.astype(np.float32) * np.float32(scale)


def pixels(config: Gemma4UnifiedConfig, processor: Any, images: Sequence[Any]) -> list[np.ndarray]:
    del config
    made, pool, patch = [], processor.pooling_kernel_size, processor.patch_size
    for image in images:
        found = processor(images=image, return_tensors="np")
        columns, rows = (found["image_position_ids"][0].max(axis=0) + 1) // pool
        patches = found["pixel_values"][0][: columns * rows * pool**2]
        lines = patches.reshape(rows, pool, columns, pool, patch, patch, 3)
        squares = lines.transpose(0, 2, 1, 4, 3, 5, 6).reshape(columns * rows, -1)
        padded = np.zeros((1, processor.max_soft_tokens, squares.shape[1]), np.float32)
        padded[0, : len(squares)] = squares
        made.append(padded)
    return made


def video_pixels(
    config: Gemma4UnifiedConfig, settings: Mapping[str, Any], videos: Sequence[Sequence[Any]]
) -> list[np.ndarray]:
    return gemma_media.video_pixels(config, settings, videos, config.edge)


def check_processor(config: Gemma4UnifiedConfig, processor: Any) -> None:
    """
    Raises:
      ModelError: it makes other squares than the model takes, or more than its windows hold.
    """
    gemma_media.check_processor(config, processor)
    windows = [
        layer.window for layer in config.decoder.attentions if layer.window and layer.sees_images
    ]
    tokens, vision = processor.max_soft_tokens, config.vision
    # In transformers all of such an image sees all of it.
    if min(windows, default=tokens) < tokens:
        raise ModelError(
            f"preprocessor_config.json: max_soft_tokens is {tokens}, and layers have windows of "
            f"{min(windows)} tokens"
        )
    if vision.positions < tokens:
        raise ModelError(
            f"preprocessor_config.json: max_soft_tokens is {tokens}, and there are positions for "
            f"{vision.positions} of a line"
        )


READ_KEYS = (
    (r"^model\.vision_embedder\.", "vision_tower."),
    (r"^model\.embed_vision\.(multimodal_embedder\.)?embedding", "multi_modal_projector.embedding"),
    (r"^model\.embed_vision\.", "vision_tower."),
    (r"^(vision_tower\.)patch_ln", r"\1patch_norm"),
    (r"^model\.", ""),
    (r"^lm_head\.", "language_model.lm_head."),
)
WRITE_KEYS = (
    (r"^(vision_tower\.)patch_norm", r"\1patch_ln"),
    (r"^vision_tower\.", "vision_embedder."),
    (r"^multi_modal_projector\.", "embed_vision."),
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^(?!lm_head)", "model."),
)
MODULE_KEYS = (
    (r"^model\.embed_vision\.", "model.embed_vision.multimodal_embedder."),
    (r"^model\.vision_embedder\.", "model.embed_vision."),
)

FAMILY = dataclasses.replace(
    gemma4.FAMILY,
    model_types=("gemma4_unified",),
    read_config=read_config,
    module=Gemma4Unified,
    rules=(
        *vision_squares.SHARDING_RULES,
        (r"multi_modal_projector/embedding_projection/kernel", PartitionSpec("fsdp", "tensor")),
        *decoder.SHARDING_RULES,
    ),
    read_keys=READ_KEYS,
    write_keys=WRITE_KEYS,
    module_keys=MODULE_KEYS,
    unread=(r"^model\.embed_audio\.",),
    joined_experts=None,
    tensor_shapes=lambda config: {},
    images=Images(
        processors=("Gemma4UnifiedImageProcessor",),
        load=Gemma4UnifiedImageProcessorPil,
        placeholders=lambda config: (config.image_token_id,),
        slot_shape=lambda config: (SOFT_TOKENS, config.vision.inputs),
        slot_shape_of=lambda config, processor: (processor.max_soft_tokens, config.vision.inputs),
        layouts=gemma_media.layouts,
        pixels=pixels,
        sized=True,
        frame=gemma_media.frame_image,
        spelled=gemma_media.spelled,
        describe=gemma_media.describe,
        check=check_processor,
    ),
    videos=dataclasses.replace(gemma4.VIDEOS, pixels=video_pixels),
)
