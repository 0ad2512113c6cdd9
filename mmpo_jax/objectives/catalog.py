"""The registry with everything in it: all modules with objectives."""

from mmpo_jax.objectives.registry import OBJECTIVES

__all__ = ["OBJECTIVES"]
