"""`mmpo objectives`, second part: every reward with what a text is worth by it, and its options."""

from __future__ import annotations

from collections.abc import Collection

from mmpo_jax.objectives.listing import render_entry
from mmpo_jax.rewards import REWARDS

INTRODUCTION = """\
Of objectives of sampled responses, under `rollout: rewards`, and as judges of a round, under
`feedback`; each has a `weight`, too. What is
right is a row's `answer` or `solution`. Boxes and short answers are read in `<answer>` tags where
there are any."""


def render_rewards(names: Collection[str] = ()) -> str:
    """The registry, or those of these names, as text."""
    blocks = [
        render_entry(
            reward.name,
            reward.formula,
            reward.source,
            reward.options,
            f"solution: {reward.solution}",
        )
        for reward in REWARDS.values()
        if reward.name in names or not set(names) & REWARDS.keys()
    ]
    return "\n\n".join(["## rewards", INTRODUCTION, *blocks])
