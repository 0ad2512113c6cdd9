"""The rewards of a recipe: a section for every one in the registry, made from its options."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mmpo_jax.core.sections import Section, any_of, section_of
from mmpo_jax.rewards import REWARDS


class RewardSection(Section):
    """One reward, with its options beside these."""

    type: str
    weight: float = 1.0
    """How much it counts beside the others."""

    def score(self, text: str, solution: Any) -> float:
        """What a text is worth, before the weight.

        Raises:
          DataError: the solution is not what the reward compares with.
        """
        options = {name: getattr(self, name) for name in REWARDS[self.type].options}
        return REWARDS[self.type].score(text, solution, **options)


SECTIONS = {
    name: section_of(RewardSection, name, reward.formula, reward.options)
    for name, reward in REWARDS.items()
}

if TYPE_CHECKING:
    Rewards = tuple[RewardSection, ...]
else:
    Rewards = any_of(SECTIONS.values())
    """A list of rewards, or one of them, by `type`."""
