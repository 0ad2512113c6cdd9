"""Rewards: what a sampled text is worth, by rules or by a function of the user's."""

from mmpo_jax.rewards import (  # noqa: F401 (they register theirs)
    answers,
    boxes,
    lengths,
    pair_verdicts,
    user_function,
)
from mmpo_jax.rewards.registry import REWARDS

__all__ = ["REWARDS"]
