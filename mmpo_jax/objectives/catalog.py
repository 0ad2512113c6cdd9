"""All modules with objectives: importing this fills the registry."""

from mmpo_jax.objectives import (
    absolute,
    batch_rules,
    preference,
    reference_free,
    scored,
    supervised,
)

__all__ = ["absolute", "batch_rules", "preference", "reference_free", "scored", "supervised"]
