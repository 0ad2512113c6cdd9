"""Model sizes and switches, read from a Hugging Face checkpoint folder's `config.json`.

transformers resolves the defaults that a `config.json` leaves out; the dataclasses here keep only
what the forward pass reads, and refuse what it does not implement.
"""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import transformers

from mmpo_jax.errors import MmpoError
from mmpo_jax.models.layers import ACTIVATIONS


class ModelError(MmpoError):
    """A checkpoint folder this library cannot run, or weights that do not fit its config."""


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """A CLIP vision transformer; sizes are in pixels, tokens or channels."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    image_size: int
    patch_size: int
    num_channels: int
    hidden_act: str
    layer_norm_eps: float

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """A Llama decoder with grouped-query attention."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_act: str
    rms_norm_eps: float
    rope_theta: float
    attention_bias: bool
    mlp_bias: bool
    tie_word_embeddings: bool


@dataclasses.dataclass(frozen=True)
class LlavaConfig:
    """LLaVA-1.5: CLIP features of chosen layers, a two-layer projector, a Llama decoder."""

    vision: VisionConfig
    decoder: DecoderConfig
    image_token_id: int
    feature_layers: tuple[int, ...]
    """Indices into the tower's hidden states: 0 is the embedding, i the output of layer i."""
    keep_class_token: bool
    projector_act: str
    projector_bias: bool

    @property
    def num_image_tokens(self) -> int:
        """N: how many prompt positions one image takes."""
        return self.vision.num_patches + int(self.keep_class_token)


def load_config(folder: str | os.PathLike[str]) -> LlavaConfig:
    """Reads `config.json` of a llava-hf checkpoint folder.

    Raises:
      ModelError: the folder has no readable config, or one of another architecture.
    """
    path = os.path.join(folder, "config.json")
    if not os.path.isfile(path):
        raise ModelError(f"{path}: not found; a checkpoint folder has a config.json")
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # transformers raises many types, its own validators bare ones
        raise ModelError(f"{path}: cannot be read as a model config: {error}") from error
    try:
        return from_huggingface(config)
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from error


def from_huggingface(config: Any) -> LlavaConfig:
    """The `LlavaConfig` of a `transformers.LlavaConfig`.

    Raises:
      ModelError: an architecture, rope type or switch that is not implemented.
    """
    _expect(config.model_type, ("llava",), "model_type")
    vision, text = config.vision_config, config.text_config
    _expect(vision.model_type, ("clip_vision_model",), "vision_config.model_type")
    _expect(text.model_type, ("llama",), "text_config.model_type")
    rope = text.rope_parameters
    _expect(rope.get("rope_type", "default"), ("default",), "text_config.rope_parameters.rope_type")
    activations = tuple(ACTIVATIONS)
    _expect(vision.hidden_act, activations, "vision_config.hidden_act")
    _expect(text.hidden_act, activations, "text_config.hidden_act")
    _expect(config.projector_hidden_act, activations, "projector_hidden_act")
    if vision.image_size % vision.patch_size:
        raise ModelError(
            f"vision_config.image_size {vision.image_size} is no multiple of its patch_size "
            f"{vision.patch_size}"
        )
    strategy = config.vision_feature_select_strategy
    _expect(strategy, ("default", "full"), "vision_feature_select_strategy")
    return LlavaConfig(
        vision=VisionConfig(
            hidden_size=vision.hidden_size,
            intermediate_size=vision.intermediate_size,
            num_layers=vision.num_hidden_layers,
            num_heads=vision.num_attention_heads,
            image_size=vision.image_size,
            patch_size=vision.patch_size,
            num_channels=vision.num_channels,
            hidden_act=vision.hidden_act,
            layer_norm_eps=vision.layer_norm_eps,
        ),
        decoder=DecoderConfig(
            vocab_size=text.vocab_size,
            hidden_size=text.hidden_size,
            intermediate_size=text.intermediate_size,
            num_layers=text.num_hidden_layers,
            num_heads=text.num_attention_heads,
            num_kv_heads=text.num_key_value_heads,
            head_dim=getattr(text, "head_dim", None)
            or text.hidden_size // text.num_attention_heads,
            hidden_act=text.hidden_act,
            rms_norm_eps=text.rms_norm_eps,
            rope_theta=float(rope["rope_theta"]),
            attention_bias=text.attention_bias,
            mlp_bias=text.mlp_bias,
            tie_word_embeddings=bool(config.tie_word_embeddings),
        ),
        image_token_id=config.image_token_id,
        feature_layers=_feature_layers(config.vision_feature_layer, vision.num_hidden_layers),
        keep_class_token=strategy == "full",
        projector_act=config.projector_hidden_act,
        projector_bias=config.multimodal_projector_bias,
    )


def _feature_layers(selected: int | list[int], num_layers: int) -> tuple[int, ...]:
    """Non-negative hidden-state indices; negative ones count from the last layer's output."""
    layers = [selected] if isinstance(selected, int) else list(selected)
    resolved = tuple(layer + num_layers + 1 if layer < 0 else layer for layer in layers)
    if any(not 0 <= layer <= num_layers for layer in resolved):
        raise ModelError(f"vision_feature_layer {selected} is outside the {num_layers} layers")
    return resolved


def _expect(value: str, known: tuple[str, ...], key: str) -> None:
    if value not in known:
        raise ModelError(f"{key} is {value!r}; this version implements {', '.join(known)}")
