"""The rewards of a recipe: a section for every one in the registry, made from its options."""

from __future__ import annotations

import functools
import operator
from typing import TYPE_CHECKING, Annotated, Any, Literal

import pydantic
from pydantic import Field

from mmpo_jax.feedback import rewards  # noqa: F401 (fills the registry)
from mmpo_jax.feedback.rewards.registry import REWARDS, Reward
from mmpo_jax.section import Section


class RewardSection(Section):
    """One reward, with its options beside these."""

    type: str
    weight: float = 1.0
    """How much it counts beside the others."""

    def score(self, text: str, answer: Any) -> float:
        """What a text is worth, before the weight.

        Raises:
          DataError: the answer is not what the reward compares with.
        """
        options = {name: getattr(self, name) for name in REWARDS[self.type].options}
        return REWARDS[self.type].score(text, answer, **options)


def _section(reward: Reward) -> type[RewardSection]:
    fields: dict[str, Any] = {"type": (Literal[reward.name], reward.name)}
    fields |= reward.options
    name = "".join(word.capitalize() for word in reward.name.split("_"))
    return pydantic.create_model(name, __base__=RewardSection, __doc__=reward.formula, **fields)


SECTIONS = {name: _section(reward) for name, reward in REWARDS.items()}

if TYPE_CHECKING:
    Rewards = tuple[RewardSection, ...]
else:
    _ANY = functools.reduce(operator.or_, SECTIONS.values())
    Rewards = Annotated[
        tuple[Annotated[_ANY, Field(discriminator="type")], ...], Field(min_length=1)
    ]
    """A list of rewards by `type`."""
