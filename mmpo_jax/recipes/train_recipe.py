"""The recipe of `mmpo train`.

Everything is checked when a recipe is loaded, before anything heavy starts; see `recipes.files`.
"""

from __future__ import annotations

from typing import Annotated, Literal

import pydantic
from pydantic import Field

from mmpo_jax.core.sections import PositiveInt, Section
from mmpo_jax.data.lengths import Lengths
from mmpo_jax.data.sources import LearnedFile
from mmpo_jax.models.config import HeadKind
from mmpo_jax.objectives.catalog import OBJECTIVES
from mmpo_jax.picture_world.source import PictureWorldData
from mmpo_jax.recipes.base import Base
from mmpo_jax.recipes.data import Mixture
from mmpo_jax.recipes.evaluation import Benchmarks
from mmpo_jax.recipes.hub import Hub
from mmpo_jax.recipes.rollout import Rollout
from mmpo_jax.recipes.training import RUNNING, Training


class Validation(Section):
    """Rows that are held out of training and measured as it goes on."""

    data: Annotated[PictureWorldData | LearnedFile, Field(discriminator="source")] | None = None
    """Other data than those of the training."""
    share: float | None = Field(None, gt=0, lt=1)
    """Share of the training data, in place of `data`; all rows of one prompt on the same side."""
    every: PositiveInt = 100
    """Steps between measurements; one before the first step and one at the end besides."""
    metric: str = "eval_loss"
    """The result is the model of the step where it was best."""
    greater_is_better: bool = False
    patience: PositiveInt | None = None
    """Measurements without a better one after which training stops."""

    @pydantic.model_validator(mode="after")
    def _one_source(self) -> Validation:
        if (self.data is None) == (self.share is None):
            raise ValueError("give either data or a share of the training data")
        return self


class TrainRecipe(Base):
    """`mmpo train`: one training stage on data that is there."""

    weights: Literal["pretrained", "random"] = "pretrained"
    """`random` takes only the config and the processor from the model folder."""
    reward_head: HeadKind | None = None
    """A new head that makes a reward model of a policy, of this type; a reward model goes on with
    the head that it has."""
    data: Mixture
    lengths: Lengths = Lengths()
    rollout: Rollout | None = None
    """Sampling and rewards, for objectives of sampled responses such as GRPO alone."""
    training: Training = Training()
    validation: Validation | None = None
    hub: Hub | None = None
    """Repository that the result is uploaded to; none by default."""
    evaluation: Benchmarks | None = None
    """What the model is measured by as it is trained; no step is chosen by them."""
    evaluate_every: PositiveInt | None = None
    """Steps between measurements by benchmarks, beside one before the first step and one at the
    end."""

    @pydantic.model_validator(mode="after")
    def _samples(self) -> TrainRecipe:
        kinds = {OBJECTIVES[section.type].kind == "rollouts" for section in self.training.objective}
        if len(kinds) > 1:
            raise ValueError("training.objective: some learn from samples, and some from data")
        if kinds != {self.rollout is not None}:
            raise ValueError(
                "rollout says how responses are sampled: a recipe has it if its objectives are of "
                "sampled responses (grpo, distillation, ...), and only then"
            )
        if self.rollout is None:
            return self
        if self.rollout.max_new_tokens > self.lengths.response[-1]:
            raise ValueError(
                f"rollout.max_new_tokens {self.rollout.max_new_tokens} is more than training keeps "
                "of a response; give lengths.response a size of as many"
            )
        if self.training.save_every % self.rollout.steps:
            raise ValueError(
                "training.save_every must be a multiple of the steps of a rollout, "
                f"minibatches times num_iterations, {self.rollout.steps}"
            )
        self._check_rollout(self.rollout)
        return self

    def _check_rollout(self, rollout: Rollout) -> None:
        """Refuses objectives and rollouts that do not fit together."""
        needs = {section.type: section.term().needs for section in self.training.objective}
        rewarded = [name for name, need in needs.items() if "advantages" in need]
        if rewarded and not rollout.rewards:
            raise ValueError(f"rollout.rewards: {rewarded[0]} learns from rewards; give one")
        if rewarded and rollout.on_policy < 1:
            raise ValueError(
                f"rollout.on_policy: {rewarded[0]} learns from rewarded samples; leave it at 1"
            )
        if rollout.reward_models and self.training.teacher is not None:
            raise ValueError(
                "rollout.rewards: a reward model reads the prompt that a teacher is shown; take "
                "one of the two"
            )
        if rollout.reward_kl and self.training.reference.type not in RUNNING:
            raise ValueError(
                "rollout.reward_kl: needs a reference that runs in the step (reference: online or "
                "ema)"
            )
        for section in self.training.objective:
            if section.term().rows.other_image == "data":
                raise ValueError(
                    f"training.objective: {section.type}: prompts have no other image of the data; "
                    "take one that is made of the image"
                )

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> TrainRecipe:
        if self.validation is not None and self.validation.every % self.training.log_every:
            raise ValueError("validation.every must be a multiple of training.log_every")
        if self.evaluate_every is not None and self.evaluation is None:
            raise ValueError("evaluate_every: `evaluation` names no benchmark")
        if self.evaluate_every is not None and self.evaluate_every % self.training.log_every:
            raise ValueError("evaluate_every must be a multiple of training.log_every")
        if self.evaluation is not None and self.reward_head is not None:
            raise ValueError("evaluation: a reward model answers no questions")
        if self.validation is not None and self.rollout is not None:
            raise ValueError(
                "validation: sampled responses are measured as they come; none held out"
            )
        types = {section.type for section in self.training.objective}
        of_world = any(isinstance(part, PictureWorldData) for part in self.data)
        if self.rollout is None and of_world and types != {"sft"}:
            raise ValueError(
                "training.objective: the picture world's dialogues hold no preferences; "
                "train on them with {type: sft}, or align"
            )
        return self
