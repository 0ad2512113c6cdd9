"""Qwen3.5: every fourth layer is gated attention, the others are gated delta nets. The vision half
is Qwen3-VL's, of which only the last layer is read."""

from __future__ import annotations

import dataclasses
from typing import Any

from mmpo_jax.models import decoder, qwen_media
from mmpo_jax.models.config import DecoderConfig, ModelConfig, ModelError, expect
from mmpo_jax.models.families import qwen3_vl
from mmpo_jax.models.family import Family
from mmpo_jax.models.layer_kinds import (
    AttentionConfig,
    DeltaNetConfig,
    ExpertsConfig,
    LayerConfig,
    MlpConfig,
)
from mmpo_jax.models.layers import ACTIVATIONS
from mmpo_jax.models.qwen_media import QwenVLConfig
from mmpo_jax.models.rope import Rope, read_rope
from mmpo_jax.models.vision_qwen import read_deep_vision
from mmpo_jax.models.vlm import VisionLanguageModel

SECTIONS = (11, 11, 10)
"""transformers' rotary sections where a config has none."""
DELTA_NET, ATTENTION = "linear_attention", "full_attention"
"""Types of layers."""
MIXTURE = "qwen3_5_moe_text"
"""The `model_type` of decoders with experts."""


def read_config(config: Any) -> QwenVLConfig:
    """
    Raises:
      ModelError: a switch that is not implemented, or parts that do not fit together.
    """
    qwen_media.check_width(config)
    return QwenVLConfig(
        family=config.model_type,
        decoder=read_text(config.text_config, config.tie_word_embeddings, "text_config", True),
        vision=read_deep_vision(config.vision_config),
        image_token_id=config.image_token_id,
        video_token_id=config.video_token_id,
    )


def read_text_config(config: Any) -> ModelConfig:
    """
    Raises:
      ModelError: a switch that is not implemented.
    """
    text = read_text(config, config.tie_word_embeddings, "config.json")
    return ModelConfig(config.model_type, text)


def read_text(text: Any, tied: bool, key: str, sections: bool = False) -> DecoderConfig:
    """The decoder of a transformers config of type `qwen3_5_text` or `qwen3_5_moe_text`.

    Args:
      text: the config.
      tied: whether the head is the token embedding.
      key: how error messages call the config.
      sections: whether tokens have positions of time, row and column; those of text are equal.

    Raises:
      ModelError: a switch that is not implemented.
    """
    expect(text.model_type, ("qwen3_5_text", MIXTURE), f"{key}.model_type")
    expect(text.hidden_act, tuple(ACTIVATIONS), f"{key}.hidden_act")
    for kind in text.layer_types:
        expect(kind, (DELTA_NET, ATTENTION), f"{key}.layer_types")
    if ATTENTION not in text.layer_types:
        raise ModelError(f"{key}.layer_types has no full_attention")
    keys, values = text.linear_num_key_heads, text.linear_num_value_heads
    if values % keys:
        raise ModelError(
            f"{key}.linear_num_value_heads is {values}, no multiple of linear_num_key_heads, {keys}"
        )
    bias = bool(text.attention_bias)
    attention = AttentionConfig(
        num_heads=text.num_attention_heads,
        num_kv_heads=text.num_key_value_heads,
        head_dim=text.head_dim,
        rope=_read_rope(text, key, sections),
        scale=text.head_dim**-0.5,
        window=0,
        softcap=None,
        qkv_bias=bias,
        out_bias=bias,
        qk_norm=True,
        gated=True,
    )
    delta_net = DeltaNetConfig(
        num_key_heads=keys,
        num_value_heads=values,
        key_dim=text.linear_key_head_dim,
        value_dim=text.linear_value_head_dim,
        conv_size=text.linear_conv_kernel_dim,
        hidden_act=text.hidden_act,
    )
    mlp = _experts(text) if text.model_type == MIXTURE else _dense(text)
    layers = (
        LayerConfig(kind, delta_net if kind == DELTA_NET else attention, mlp)
        for kind in text.layer_types
    )
    return DecoderConfig(
        vocab_size=text.vocab_size,
        hidden_size=text.hidden_size,
        layers=tuple(layers),
        rms_norm_eps=text.rms_norm_eps,
        tie_word_embeddings=bool(tied),
        norm_offset=True,
    )


def _dense(text: Any) -> MlpConfig:
    return MlpConfig(text.intermediate_size, text.hidden_act, False)


def _experts(text: Any) -> ExpertsConfig:
    return ExpertsConfig(
        num_experts=text.num_experts,
        top_k=text.num_experts_per_tok,
        intermediate_size=text.moe_intermediate_size,
        hidden_act=text.hidden_act,
        normalised=True,
        shared_size=text.shared_expert_intermediate_size,
    )


def _read_rope(text: Any, key: str, sections: bool) -> Rope:
    """Of the first channels of every head; axes take turns."""
    parameters = dict(text.rope_parameters)
    expect(parameters.get("mrope_interleaved", True), (True,), f"{key}.mrope_interleaved")
    turned = int(text.head_dim * parameters.pop("partial_rotary_factor", 1.0))
    found = tuple(parameters.pop("mrope_section", None) or SECTIONS)
    try:
        rope = read_rope(parameters, turned, text.max_position_embeddings)
    except ValueError as error:
        raise ModelError(f"{key}.rope_parameters: {error}") from error
    return dataclasses.replace(rope, sections=found, interleaved=True) if sections else rope


def conv_shapes(config: DecoderConfig, prefix: str) -> dict[str, tuple[int, ...]]:
    """Shapes of the convolutions' tensors, which have an axis of one in the middle.

    Args:
      config: the decoder.
      prefix: of the names of layers.
    """
    return {
        f"{prefix}{number}.linear_attn.conv1d.weight": (
            layer.mixer.channels,
            1,
            layer.mixer.conv_size,
        )
        for number, layer in enumerate(config.layers)
        if isinstance(layer.mixer, DeltaNetConfig)
    }


UNREAD = (r"^mtp\.",)
"""Weights for predicting several tokens at once, which transformers does not read either."""

FAMILY = dataclasses.replace(
    qwen3_vl.FAMILY,
    model_types=("qwen3_5",),
    read_config=read_config,
    tensor_shapes=lambda config: {
        **qwen3_vl.FAMILY.tensor_shapes(config),
        **conv_shapes(config.decoder, "model.language_model.layers."),
    },
    unread=UNREAD,
)
TEXT = Family(
    model_types=("qwen3_5_text",),
    read_config=read_text_config,
    module=VisionLanguageModel,
    rules=decoder.SHARDING_RULES,
    read_keys=(
        (r"^model\.(language_model\.)?", "language_model."),
        (r"^lm_head\.", "language_model.lm_head."),
    ),
    write_keys=(
        (r"^language_model\.lm_head\.", "lm_head."),
        (r"^language_model\.", "model."),
    ),
    reward_classes={"qwen3_5_text": "Qwen3_5TextForSequenceClassification"},
    tensor_shapes=lambda config: conv_shapes(config.decoder, "model.layers."),
    unread=(*UNREAD, r"^model\.visual\."),
)
