"""All modules with objectives: importing this fills the registry."""

from mmpo_jax.objectives import image_aware, joint, preference, supervised, token_level

__all__ = ["image_aware", "joint", "preference", "supervised", "token_level"]
