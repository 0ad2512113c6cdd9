"""Qwen3-VL's mixtures: Qwen3-VL with experts in the decoder, all of a layer in one tensor."""

from __future__ import annotations

import dataclasses

from mmpo_jax.models.families import qwen3_vl

FAMILY = dataclasses.replace(
    qwen3_vl.FAMILY, model_types=("qwen3_vl_moe",), joined_experts="inputs_first"
)
