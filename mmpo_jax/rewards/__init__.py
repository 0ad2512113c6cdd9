"""Verifiable rewards: what a sampled text is worth, by rules, beside what the data say is right."""

from mmpo_jax.rewards import answers, boxes  # noqa: F401 (they register theirs)
from mmpo_jax.rewards.registry import REWARDS

__all__ = ["REWARDS"]
