"""The section of a recipe that says how responses are sampled and rewarded as training goes on."""

from __future__ import annotations

from typing import Any

import pydantic
from pydantic import Field

from mmpo_jax.core.sections import PositiveInt, Section
from mmpo_jax.objectives.advantages import Aggregation, Baseline, Scale
from mmpo_jax.recipes.rewards import RewardModelReward, Rewards, RewardSection


class Rollout(Section):
    """How an on-policy objective comes by its responses: sampled from the policy and rewarded.

    Samples are of the whole distribution. The loss knows nothing of a cut, so `top_p` and `top_k`
    would bias it: there are none here.
    """

    rewards: Rewards = ()
    """`weight` is how much one counts beside the others. Distillation alone needs none."""
    num_samples: PositiveInt = 8
    """Responses to every prompt of a batch, which are compared with each other."""
    temperature: float = Field(1.0, gt=0)
    """Logits are divided by it in samples and in the loss, as in TRL."""
    max_new_tokens: PositiveInt = 64
    minibatches: PositiveInt = 1
    """Parts of `batch_size` prompts that a rollout is cut into, a step for each."""
    num_iterations: PositiveInt = 1
    """How often the same responses are learned from; TRL's name."""
    baseline: Baseline = "mean"
    """What a response's reward is compared with: the `mean` of its prompt's, that of the others
    (`leave_one_out`, RLOO), or nothing (`none`)."""
    scale: Scale = "group"
    """What its lead is divided by: the standard deviation of its prompt's rewards, of the batch's,
    or nothing; `whiten` takes leads less their mean in the batch by their standard deviation there
    (REINFORCE++)."""
    aggregation: Aggregation = "sum_then_normalize"
    """How several rewards become one; `normalize_then_sum` is GDPO."""
    reward_kl: float = Field(0.0, ge=0)
    """What a response's reward loses for log pi_old - log ref of all its tokens, times this (RLOO's
    `beta` in TRL)."""
    dynamic_sampling: PositiveInt | None = None
    """Leaves out prompts whose samples are all worth the same, and samples the next ones in their
    place, for a batch at most so many batches (DAPO); 1 leaves out alone."""
    mask_truncated: bool = False
    """Whether samples that the length limit cut teach nothing; they still are compared with."""
    max_failed: float = Field(0.5, ge=0, le=1)
    """Share of a rollout's samples that may have no verdict of any reward before the run stops.
    Rollouts are small, and such samples count as the mean of the others."""
    on_policy: float = Field(1.0, ge=0, le=1)
    """Share of the batches whose responses are sampled; the others have those of the data (GKD's
    lambda). For distillation, which needs no rewards."""

    @pydantic.field_validator("rewards")
    @classmethod
    def _distinct(cls, rewards: Rewards) -> Rewards:
        types = [section.type for section in rewards]
        if len(set(types)) < len(types):
            raise ValueError("give each type once")
        return rewards

    @pydantic.model_validator(mode="before")
    @classmethod
    def _whole_distribution(cls, options: Any) -> Any:
        cut = [name for name in ("top_p", "top_k") if isinstance(options, dict) and name in options]
        if cut:
            raise ValueError(f"{cut[0]}: the loss is that of samples of the whole distribution")
        return options

    @pydantic.model_validator(mode="after")
    def _compares(self) -> Rollout:
        if self.aggregation == "normalize_then_sum":
            for name in ("baseline", "scale", "reward_kl"):
                if self._says(name):
                    raise ValueError(f"{name}: normalize_then_sum has each reward by itself")
        if self.rewards and self.baseline != "none" and self.num_samples < 2:
            raise ValueError(
                f"num_samples: {self.num_samples} are not compared with each other; give 2, or "
                "`baseline: none`"
            )
        if not self.rewards:
            of_rewards = ("baseline", "scale", "aggregation", "reward_kl", "dynamic_sampling")
            for name in (*of_rewards, "max_failed"):
                if self._says(name):
                    raise ValueError(f"{name}: is of rewards, and there are none")
        return self

    @pydantic.model_validator(mode="after")
    def _rewards_tell_samples_apart(self) -> Rollout:
        for section in self.rules:
            silent = section.silent
            if silent is not None and silent.tokens >= self.max_new_tokens:
                raise ValueError(
                    f"rewards: {section.type} is 0 up to {silent.tokens} tokens ({silent.options}),"
                    f" and max_new_tokens {self.max_new_tokens} lets no sample have more"
                )
        return self

    def _says(self, name: str) -> bool:
        """Whether an option is another than its default."""
        return bool(getattr(self, name) != type(self).model_fields[name].default)

    @property
    def rules(self) -> list[RewardSection]:
        """The rewards that are functions of texts or tokens."""
        return [section for section in self.rewards if isinstance(section, RewardSection)]

    @property
    def reward_models(self) -> list[RewardModelReward]:
        """The rewards that are models."""
        return [section for section in self.rewards if isinstance(section, RewardModelReward)]

    @property
    def steps(self) -> int:
        """Updates that a rollout is learned from in."""
        return self.minibatches * self.num_iterations

    @property
    def needs_old(self) -> bool:
        """Whether the log-probs under what sampled are read."""
        return self.steps > 1 or self.reward_kl > 0

    def identity(self) -> dict[str, Any]:
        """The options the trained weights depend on."""
        return self.model_dump(mode="json", exclude={"max_failed"})
