"""All modules with objectives: importing this fills the registry."""

from mmpo_jax.objectives import (
    absolute,
    batch_rules,
    image_aware,
    joint,
    preference,
    reference_free,
    scored,
    supervised,
    token_level,
)

__all__ = [
    "absolute",
    "batch_rules",
    "image_aware",
    "joint",
    "preference",
    "reference_free",
    "scored",
    "supervised",
    "token_level",
]
