"""Text-only decoders: Llama, Mistral, Ministral 3, Qwen2 and Qwen3, dense and a mixture."""

from __future__ import annotations

from typing import Any

from mmpo_jax.models import decoder
from mmpo_jax.models.config import ModelConfig, read_decoder
from mmpo_jax.models.family import Family
from mmpo_jax.models.vlm import VisionLanguageModel


def read_config(config: Any) -> ModelConfig:
    tied = config.tie_word_embeddings
    return ModelConfig(config.model_type, read_decoder(config, tied, "config.json"))


FAMILY = Family(
    model_types=("llama", "mistral", "ministral3", "qwen2", "qwen3", "qwen3_moe"),
    read_config=read_config,
    module=VisionLanguageModel,
    rules=decoder.SHARDING_RULES,
    read_keys=((r"^model\.", "language_model."), (r"^lm_head\.", "language_model.lm_head.")),
    write_keys=(
        (r"^language_model\.lm_head\.", "lm_head."),
        (r"^language_model\.", "model."),
    ),
    reward_classes={
        "llama": "LlamaForSequenceClassification",
        "mistral": "MistralForSequenceClassification",
        "ministral3": "Ministral3ForSequenceClassification",
        "qwen2": "Qwen2ForSequenceClassification",
        "qwen3": "Qwen3ForSequenceClassification",
        "qwen3_moe": "Qwen3MoeForSequenceClassification",
    },
)
