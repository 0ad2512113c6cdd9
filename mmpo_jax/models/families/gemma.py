"""Gemma's text decoders: Gemma 2 and the text half of Gemma 3."""

from __future__ import annotations

from typing import Any

from mmpo_jax.models import decoder
from mmpo_jax.models.config import DecoderConfig, ModelConfig, ModelError, expect
from mmpo_jax.models.families import text
from mmpo_jax.models.family import Family
from mmpo_jax.models.layer_kinds import AttentionConfig, LayerConfig, MlpConfig
from mmpo_jax.models.layers import ACTIVATIONS
from mmpo_jax.models.rope import Rope, read_rope
from mmpo_jax.models.vlm import VisionLanguageModel

SLIDING, FULL = "sliding_attention", "full_attention"


def read_config(config: Any) -> ModelConfig:
    tied, key = config.tie_word_embeddings, "config.json"
    return ModelConfig(config.model_type, read_gemma(config, tied, key))


def read_gemma(
    text: Any, tied: bool, key: str = "text_config", sees_images: bool = False
) -> DecoderConfig:
    """The decoder of a transformers config of Gemma 2 or 3.

    Args:
      text: a `transformers` config.
      tied: whether the head is the token embedding.
      key: how error messages call the config.
      sees_images: see `AttentionConfig.sees_images`.

    Raises:
      ModelError: an architecture, rope type or switch that is not implemented.
    """
    kind = text.model_type
    expect(kind, ("gemma2", "gemma3_text"), f"{key}.model_type")
    expect(text.hidden_activation, tuple(ACTIVATIONS), f"{key}.hidden_activation")
    expect(
        bool(getattr(text, "use_bidirectional_attention", False)),
        (False,),
        f"{key}.use_bidirectional_attention",
    )
    softcap = text.attn_logit_softcapping
    if kind == "gemma3_text":  # whose code does not read it
        expect(softcap, (None,), f"{key}.attn_logit_softcapping")
    mlp = MlpConfig(text.intermediate_size, text.hidden_activation, False)

    def layer(name: str) -> LayerConfig:
        expect(name, (SLIDING, FULL), f"{key}.layer_types")
        attention = AttentionConfig(
            num_heads=text.num_attention_heads,
            num_kv_heads=text.num_key_value_heads,
            head_dim=text.head_dim,
            rope=_rope(text, name, key),
            scale=text.query_pre_attn_scalar**-0.5,
            window=text.sliding_window if name == SLIDING else 0,
            softcap=softcap,
            qkv_bias=bool(text.attention_bias),
            out_bias=bool(text.attention_bias),
            qk_norm=kind == "gemma3_text",
            sees_images=sees_images,
        )
        return LayerConfig(name, attention, mlp, sandwich=True)

    kinds = {name: layer(name) for name in set(text.layer_types)}
    return DecoderConfig(
        vocab_size=text.vocab_size,
        hidden_size=text.hidden_size,
        layers=tuple(kinds[name] for name in text.layer_types),
        rms_norm_eps=text.rms_norm_eps,
        tie_word_embeddings=bool(tied),
        norm_offset=True,
        embedding_scale=text.hidden_size**0.5,
        softcap=text.final_logit_softcapping,
    )


def _rope(text: Any, name: str, key: str) -> Rope:
    """The rotary embedding of a kind of layers; Gemma 2 has one for both."""
    parameters = text.rope_parameters
    parameters = parameters.get(name, parameters)
    try:
        return read_rope(parameters, text.head_dim, text.max_position_embeddings)
    except ValueError as error:
        raise ModelError(f"{key}.rope_parameters: {error}") from error


FAMILY = Family(
    model_types=("gemma2", "gemma3_text"),
    read_config=read_config,
    module=VisionLanguageModel,
    rules=decoder.SHARDING_RULES,
    read_keys=text.FAMILY.read_keys,
    write_keys=text.FAMILY.write_keys,
    reward_classes={
        "gemma2": "Gemma2ForSequenceClassification",
        "gemma3_text": "Gemma3TextForSequenceClassification",
    },
)
