"""All modules with objectives: importing this fills the registry."""

from mmpo_jax.objectives import preference, supervised

__all__ = ["preference", "supervised"]
