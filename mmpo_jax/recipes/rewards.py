"""The rewards of a recipe: a section for every one in the registry, made from its options."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, Self

import pydantic

from mmpo_jax.core.sections import Section, any_of, section_of
from mmpo_jax.recipes.scoring import RewardModelAsked
from mmpo_jax.rewards import REWARDS
from mmpo_jax.rewards.registry import Question, Silent, Value
from mmpo_jax.rewards.user_function import check_function, fingerprint_function


class RewardSection(Section):
    """One reward, with its options beside these."""

    type: str
    weight: float = 1.0
    """Factor of its values: how much it counts beside the others of a rollout."""

    @pydantic.model_validator(mode="after")
    def _fits(self) -> Self:
        REWARDS[self.type].check(self._options())
        return self

    def _options(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in REWARDS[self.type].options}

    def values(
        self, question: Question, texts: Sequence[str], tokens: Sequence[Sequence[int]] = ()
    ) -> list[Value]:
        """What every text is worth as an answer to a question, before the weight.

        Args:
          question, texts, tokens: see `Reward.values`.

        Raises:
          DataError: the solution is not what the reward compares with, or a function of the user's
            gives no values.
        """
        return REWARDS[self.type].values(question, texts, tokens, **self._options())

    def check(self, solution: Any) -> None:
        """Whether a solution is what the reward compares with; a user's function is not asked.

        Raises:
          DataError: it is not.
        """
        if REWARDS[self.type].reads == "text":
            REWARDS[self.type].score("", solution, **self._options())

    @property
    def silent(self) -> Silent | None:
        """See `Reward.silent`."""
        return REWARDS[self.type].silent(self._options())

    @property
    def of_user(self) -> bool:
        """Whether it is a function of the user's."""
        return self.type == "python"

    def key(self) -> dict[str, Any]:
        """All that its values depend on beside question and text.

        Raises:
          MmpoError: a function of the user's cannot be loaded.
        """
        key = self.model_dump(mode="json", exclude={"weight"})
        if self.of_user:
            options = self._options()
            check_function(options["function"], options["arguments"])
            key["source"] = fingerprint_function(options["function"])
        return key


class RewardModelReward(RewardModelAsked):
    """What a reward model says of a text, which is on the devices beside the policy."""

    type: Literal["reward_model"] = "reward_model"
    weight: float = 1.0
    """Factor of its values: how much it counts beside the others of a rollout."""


SECTIONS = {
    name: section_of(RewardSection, name, reward.formula, reward.options)
    for name, reward in REWARDS.items()
}

if TYPE_CHECKING:
    Rewards = tuple[RewardSection | RewardModelReward, ...]
else:
    Rewards = any_of([*SECTIONS.values(), RewardModelReward], least=0)
    """A list of rewards, empty for none, or one of them, by `type`."""
