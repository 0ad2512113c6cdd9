"""The registry with everything in it: all modules with objectives."""

from mmpo_jax.objectives import (  # noqa: F401 (they register their functions)
    absolute,
    batch_rules,
    distillation,
    image_aware,
    joint,
    on_policy,
    preference,
    rankings,
    reference_free,
    reward_model,
    scored,
    supervised,
    token_level,
    unpaired,
)
from mmpo_jax.objectives.registry import OBJECTIVES

__all__ = ["OBJECTIVES"]
