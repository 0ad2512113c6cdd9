"""Verifiable rewards: what a sampled text is worth, by rules, beside what the data say is right."""

from mmpo_jax.feedback.rewards import answers, boxes, shapes  # noqa: F401 (they register theirs)
from mmpo_jax.feedback.rewards.registry import REWARDS

__all__ = ["REWARDS"]
