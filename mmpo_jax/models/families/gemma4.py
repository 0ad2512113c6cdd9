"""Gemma 4: its own vision transformer over patches of images of any shape, a matrix, a decoder of
local and global layers that differ in their heads.

In the 26B there are experts beside every MLP. In E2B and E4B every layer reads an embedding of its
own, and the last layers read keys and values of earlier ones. Their parts for audio are left out.

Tokens of an image see one another in local layers alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from mmpo_jax.models import decoder, gemma_media, vision_gemma
from mmpo_jax.models.config import DecoderConfig, ModelError, expect
from mmpo_jax.models.families.gemma import FULL, SLIDING
from mmpo_jax.models.family import Family, Images, Videos
from mmpo_jax.models.layer_kinds import (
    AttentionConfig,
    ExpertsConfig,
    LayerConfig,
    MlpConfig,
    PerLayerConfig,
)
from mmpo_jax.models.layers import ACTIVATIONS, unit_norm
from mmpo_jax.models.linear import linear
from mmpo_jax.models.rope import read_rope
from mmpo_jax.models.vision_gemma import GemmaVisionConfig, GemmaVisionTower, read_vision
from mmpo_jax.models.vlm import VisionLanguageModel


@dataclasses.dataclass(frozen=True)
class Gemma4Config(gemma_media.GemmaMediaConfig):
    """Gemma 4's own switches."""

    vision: GemmaVisionConfig


def read_config(config: Any) -> Gemma4Config:
    """
    Raises:
      ModelError: a switch that is not implemented.
    """
    if config.vision_config is None:
        raise ModelError("vision_config is missing; this version implements gemma4 with images")
    return Gemma4Config(
        family=config.model_type,
        decoder=read_gemma4(config.text_config, config.tie_word_embeddings),
        vision=read_vision(config.vision_config),
        image_token_id=config.image_token_id,
        video_token_id=config.video_token_id,
    )


def read_gemma4(
    text: Any,
    tied: bool,
    key: str = "text_config",
    image_layers: Literal["local", "all"] = "local",
) -> DecoderConfig:
    """The decoder of a transformers `Gemma4TextConfig` or `Gemma4UnifiedTextConfig`.

    Args:
      text: the config.
      tied: whether the head is the token embedding.
      key: how error messages call the config.
      image_layers: in which layers tokens of an image see one another, if they do.

    Raises:
      ModelError: a rope type or a switch that is not implemented.
    """
    expect(text.hidden_activation, tuple(ACTIVATIONS), f"{key}.hidden_activation")
    seeing = text.use_bidirectional_attention
    expect(seeing, (None, "vision"), f"{key}.use_bidirectional_attention")
    sources = _read_sources(text, key)
    per_layer = _read_per_layer(text, key)
    experts = _read_experts(text, key) if getattr(text, "enable_moe_block", False) else None

    def layer(number: int) -> LayerConfig:
        name, own = text.layer_types[number], text.per_layer_config[number]
        expect(name, (SLIDING, FULL), f"{key}.layer_types")
        parameters = text.rope_parameters[name]
        try:
            rope = read_rope(parameters, own.head_dim, text.max_position_embeddings)
        except ValueError as error:
            raise ModelError(f"{key}.rope_parameters: {error}") from error
        is_local, source = name == SLIDING, sources[number]
        is_source = number in sources
        widened = bool(text.use_double_wide_mlp) and source is not None
        mlp = MlpConfig(
            text.intermediate_size * (2 if widened else 1), text.hidden_activation, False
        )
        attention = AttentionConfig(
            num_heads=text.num_attention_heads,
            num_kv_heads=own.num_key_value_heads,
            head_dim=own.head_dim,
            rope=rope,
            scale=1.0,
            window=text.sliding_window if is_local else 0,
            softcap=None,
            qkv_bias=bool(text.attention_bias),
            out_bias=bool(text.attention_bias),
            qk_norm=True,
            value_norm=True,
            keys_are_values=bool(text.attention_k_eq_v) and not is_local,
            sees_images=seeing == "vision" and (is_local or image_layers == "all"),
            is_kv_source=is_source,
            kv_source=source,
        )
        if is_source or source is not None:
            name += "_kv_source" if is_source else "_kv_shared"
        return LayerConfig(
            name, attention, mlp, sandwich=True, experts=experts, per_layer=per_layer, scaled=True
        )

    return DecoderConfig(
        vocab_size=text.vocab_size,
        hidden_size=text.hidden_size,
        layers=tuple(map(layer, range(text.num_hidden_layers))),
        rms_norm_eps=text.rms_norm_eps,
        tie_word_embeddings=bool(tied),
        embedding_scale=text.hidden_size**0.5,
        softcap=text.final_logit_softcapping,
    )


def _read_sources(text: Any, key: str) -> list[int | None]:
    """Of every layer the one whose keys and values it reads, of its own kind; None for its own.

    Raises:
      ModelError: there is no such layer.
    """
    kinds, own = text.layer_types, text.num_hidden_layers - text.num_kv_shared_layers
    missing = set(kinds) - set(kinds[: max(0, own)])
    if missing:
        raise ModelError(
            f"{key}.num_kv_shared_layers is {text.num_kv_shared_layers}, which leaves no "
            f"{sorted(missing)[0]} with keys of its own"
        )
    last = {kind: number for number, kind in enumerate(kinds[:own])}
    return [None] * own + [last[kind] for kind in kinds[own:]]


def _read_per_layer(text: Any, key: str) -> PerLayerConfig | None:
    """
    Raises:
      ModelError: no token stands for features of images.
    """
    if not getattr(text, "hidden_size_per_layer_input", 0):
        return None
    size, pad = text.vocab_size_per_layer_input, text.pad_token_id
    if pad is None or not 0 <= pad < size or size < text.vocab_size:
        raise ModelError(
            f"{key}.vocab_size_per_layer_input is {size}, with a vocabulary of {text.vocab_size} "
            f"and pad_token_id {pad}"
        )
    return PerLayerConfig(text.hidden_size_per_layer_input, size, pad)


def _read_experts(text: Any, key: str) -> ExpertsConfig:
    """
    Raises:
      ModelError: a size is not given.
    """
    for name in ("num_experts", "top_k_experts", "moe_intermediate_size"):
        if not getattr(text, name):
            raise ModelError(f"{key}.{name} is {getattr(text, name)}, and enable_moe_block is true")
    return ExpertsConfig(
        num_experts=text.num_experts,
        top_k=text.top_k_experts,
        intermediate_size=text.moe_intermediate_size,
        hidden_act=text.hidden_activation,
        normalised=True,
    )


class Embedder(nnx.Module):
    """Features in the decoder's width, normalised before."""

    def __init__(self, inputs: int, outputs: int, epsilon: float, rngs: nnx.Rngs):
        self.epsilon = epsilon
        self.embedding_projection = linear(inputs, outputs, False, rngs)

    def __call__(self, x: Float[Array, "*b D"]) -> Float[Array, "*b F"]:
        return self.embedding_projection(unit_norm(x, self.epsilon))


class Gemma4(VisionLanguageModel):
    """Every slot of a prompt is an image or some frames, their patches line by line."""

    def __init__(self, config: Gemma4Config, rngs: nnx.Rngs):
        super().__init__(config, rngs)
        tower = config.vision
        self.square = tower.pool**2
        self.vision_tower = GemmaVisionTower(tower, rngs)
        self.multi_modal_projector = Embedder(
            tower.hidden_size, config.decoder.hidden_size, tower.rms_norm_eps, rngs
        )

    def image_tokens(self, batch):
        return batch.pixel_values.shape[2] // self.square

    def image_features(self, batch, remat):
        b, i = batch.pixel_values.shape[:2]
        pixels = batch.pixel_values.reshape(b * i, *batch.pixel_values.shape[2:])
        features = self.vision_tower(pixels, batch.patches["grid"].reshape(b * i, 3), remat)
        features = self.multi_modal_projector(features)
        return features.reshape(b, -1, features.shape[-1])


def pixels(config: Gemma4Config, processor: Any, images: Sequence[Any]) -> list[np.ndarray]:
    del config
    made = [processor(images=image, return_tensors="np")["pixel_values"] for image in images]
    return [np.asarray(pixels, np.float32) for pixels in made]


def video_pixels(
    config: Gemma4Config, settings: Mapping[str, Any], videos: Sequence[Sequence[Any]]
) -> list[np.ndarray]:
    return gemma_media.video_pixels(config, settings, videos, config.vision.patch_size)


def tensor_shapes(config: Gemma4Config) -> dict[str, tuple[int, ...]]:
    """Limits of the tower's dense layers, single numbers in files."""
    tower = config.vision
    dense = [f"self_attn.{name}_proj" for name in ("q", "k", "v", "o")]
    dense += [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
    layers = range(tower.num_layers) if tower.clipped else ()
    return {
        f"model.vision_tower.encoder.layers.{number}.{name}.{side}_{limit}": ()
        for number in layers
        for name in dense
        for side in ("input", "output")
        for limit in ("min", "max")
    }


READ_KEYS = (
    (r"^model\.embed_vision\.", "multi_modal_projector."),
    (r"^model\.", ""),
    (r"^lm_head\.", "language_model.lm_head."),
    (r"^vision_tower\.encoder\.", "vision_tower."),
    (r"^(vision_tower\.layers\..*_proj)\.linear\.", r"\1."),
)
WRITE_KEYS = (
    (r"^(vision_tower\.layers\..*_proj)\.weight$", r"\1.linear.weight"),
    (r"^vision_tower\.layers\.", "vision_tower.encoder.layers."),
    (r"^multi_modal_projector\.", "embed_vision."),
    (r"\.router\.weight$", ".router.scale"),
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^(?!lm_head)", "model."),
)

VIDEOS = Videos(
    placeholder=gemma_media.video_token,
    settings=gemma_media.VIDEO_FILE,
    read_settings=gemma_media.read_video_settings,
    layouts=gemma_media.video_layouts,
    pixels=video_pixels,
    frame=gemma_media.frame_video,
)

FAMILY = Family(
    model_types=("gemma4",),
    read_config=read_config,
    module=Gemma4,
    rules=(
        *vision_gemma.SHARDING_RULES,
        (r"multi_modal_projector/embedding_projection/kernel", PartitionSpec("fsdp", "tensor")),
        *decoder.SHARDING_RULES,
    ),
    read_keys=READ_KEYS,
    write_keys=WRITE_KEYS,
    module_keys=(),
    unread=(r"^model\.(audio_tower|embed_audio)\.",),
    left_out=("audio_config",),
    joined_experts="outputs_first",
    tensor_shapes=tensor_shapes,
    images=Images(
        processors=("Gemma4ImageProcessor",),
        placeholders=lambda config: (config.image_token_id,),
        slot_shape=lambda config: (config.vision.slot_patches, config.vision.patch_inputs),
        slot_shape_of=lambda config, processor: (
            processor.max_soft_tokens * config.vision.pool**2,
            config.vision.patch_inputs,
        ),
        layouts=gemma_media.layouts,
        pixels=pixels,
        sized=True,
        frame=gemma_media.frame_image,
        spelled=gemma_media.spelled,
        describe=gemma_media.describe,
        check=gemma_media.check_processor,
    ),
    videos=VIDEOS,
)
