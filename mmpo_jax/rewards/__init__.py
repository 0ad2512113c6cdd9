"""Rewards: what a sampled text is worth, by rules or by a function of the user's."""

from mmpo_jax.rewards import answers, boxes, user_function  # noqa: F401 (they register theirs)
from mmpo_jax.rewards.registry import REWARDS

__all__ = ["REWARDS"]
