"""The architectures that are implemented, a file for each."""

from mmpo_jax.models.families import llava, qwen2_5_vl, text
from mmpo_jax.models.family import Family

FAMILIES: dict[str, Family] = {
    name: family
    for family in (llava.FAMILY, qwen2_5_vl.FAMILY, text.FAMILY)
    for name in family.model_types
}
"""By config.json's `model_type`."""
