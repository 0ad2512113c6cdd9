"""All modules with objectives: importing this fills the registry."""

from mmpo_jax.objectives import (
    on_policy,
    preference,
    rankings,
    reward_model,
    supervised,
    unpaired,
)

__all__ = ["on_policy", "preference", "rankings", "reward_model", "supervised", "unpaired"]
