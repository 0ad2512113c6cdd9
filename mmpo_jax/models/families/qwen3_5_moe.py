"""Qwen3.5's mixtures: Qwen3.5 with experts in every layer, and one that all tokens pass."""

from __future__ import annotations

import dataclasses

from mmpo_jax.models.families import qwen3_5

FAMILY = dataclasses.replace(qwen3_5.FAMILY, model_types=("qwen3_5_moe",))
TEXT = dataclasses.replace(qwen3_5.TEXT, model_types=("qwen3_5_moe_text",), reward_classes={})
