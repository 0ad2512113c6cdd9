"""The architectures that are implemented, a file for each."""

from mmpo_jax.models.families import (
    gemma,
    gemma3,
    gemma4,
    gemma4_unified,
    internvl,
    llava,
    llava_next,
    llava_onevision,
    mistral3,
    qwen2_5_vl,
    qwen3_5,
    qwen3_5_moe,
    qwen3_vl,
    qwen3_vl_moe,
    smolvlm,
    text,
)
from mmpo_jax.models.family import Family

FAMILIES: dict[str, Family] = {
    name: family
    for family in (
        llava.FAMILY,
        llava_next.FAMILY,
        llava_onevision.FAMILY,
        internvl.FAMILY,
        qwen2_5_vl.FAMILY,
        qwen3_vl.FAMILY,
        qwen3_vl_moe.FAMILY,
        qwen3_5.FAMILY,
        qwen3_5.TEXT,
        qwen3_5_moe.FAMILY,
        qwen3_5_moe.TEXT,
        smolvlm.FAMILY,
        smolvlm.SMOLVLM,
        mistral3.FAMILY,
        gemma3.FAMILY,
        gemma4.FAMILY,
        gemma4_unified.FAMILY,
        gemma.FAMILY,
        text.FAMILY,
    )
    for name in family.model_types
}
"""config.json's `model_type` -> its family."""
