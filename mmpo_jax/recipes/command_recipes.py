"""Recipes of the commands that train nothing."""

from __future__ import annotations

import pydantic

from mmpo_jax.core.sections import PositiveInt, Section, Seed
from mmpo_jax.data.lengths import Lengths
from mmpo_jax.data.sources import FileData
from mmpo_jax.picture_world.source import PictureWorldData
from mmpo_jax.recipes.base import Attention, Base, Devices, Template
from mmpo_jax.recipes.correction import Corrector, Layout, RuleCorrecting
from mmpo_jax.recipes.data import Data
from mmpo_jax.recipes.evaluation import Benchmarks
from mmpo_jax.recipes.sampling import BestOfNSampling, LongSampling
from mmpo_jax.recipes.scoring import ImplicitReward, Rewarding, RewardModelAsked, Scoring
from mmpo_jax.recipes.serving import Serving


class GenerateRecipe(Base):
    """`mmpo generate`: responses to prompts, as JSONL."""

    data: Data
    lengths: Lengths | None = None
    """Bucket sizes; by default those that the data need."""
    sampling: LongSampling = LongSampling()


class ScoreRecipe(Base):
    """`mmpo score`: log-probs of responses, as JSONL."""

    data: Data
    lengths: Lengths | None = None
    """Bucket sizes; by default those that the data need, and nothing is cut."""
    scoring: Scoring = Scoring()


class RewardRecipe(Base):
    """`mmpo reward`: rewards of responses under a reward model, as JSONL."""

    data: FileData
    lengths: Lengths | None = None
    """Bucket sizes; by default those that the data need, and nothing is left out for its length."""
    rewarding: Rewarding = Rewarding()


class SelectRecipe(Base):
    """`mmpo select`: of several responses to a prompt the one with the best reward."""

    reference: str | None = None
    """Checkpoint that the policy, `model`, was trained from, for DPO's own reward; any name that
    `model` may have."""
    reward_model: RewardModelAsked | None = None
    """A reward model, in place of a reference."""
    data: Data
    """Prompts; rows with their responses where `sampling` is null."""
    lengths: Lengths | None = None
    """Bucket sizes; by default those that the data need, and nothing is cut."""
    sampling: BestOfNSampling | None = BestOfNSampling()
    """How the policy samples responses; null takes those of the data."""
    reward: ImplicitReward = ImplicitReward()
    batch_size: PositiveInt = 8
    """Prompts at a time, with all of their responses."""

    @pydantic.model_validator(mode="after")
    def _responses_fit(self) -> SelectRecipe:
        if self.lengths is None or self.sampling is None:
            return self
        if self.sampling.max_new_tokens > self.lengths.response[-1]:
            raise ValueError(
                f"sampling.max_new_tokens {self.sampling.max_new_tokens} is more than is scored of "
                "a response; give lengths.response a size of as many"
            )
        return self

    @pydantic.model_validator(mode="after")
    def _one_reward(self) -> SelectRecipe:
        if (self.reference is None) == (self.reward_model is None):
            raise ValueError("give either reference, for DPO's own reward, or reward_model")
        return self

    @pydantic.model_validator(mode="after")
    def _has_responses(self) -> SelectRecipe:
        if self.sampling is None and isinstance(self.data, PictureWorldData):
            raise ValueError("sampling: null takes responses of the data; give a file of them")
        return self


class ServeRecipe(Section):
    """`mmpo serve`: a checkpoint behind OpenAI's chat protocol."""

    model: str
    """Checkpoint, by any name that `model` of other recipes may have."""
    template: Template = "auto"
    """How dialogues become text."""
    devices: Devices = Devices()
    attention: Attention = "auto"
    serving: Serving = Serving()


class CorrectRecipe(Section):
    """`mmpo correct`: of pairs, what is wrong with the rejected responses, as questions and answers
    behind the chosen ones."""

    seed: Seed = 0
    output: str
    """JSONL file, or a folder, which gets `corrected.jsonl`."""
    data: FileData
    """Rows with chosen and rejected responses; of a ranking the best and the worst."""
    corrector: Corrector = RuleCorrecting()
    codebook: str | None = None
    """YAML file of the errors that are looked for; `correction/codebook.yaml` of the package by
    default."""
    max_errors: PositiveInt = 3
    """Errors of a response that are asked about, each by a question whose answer is yes and one
    whose answer is no."""
    layout: Layout = "dialogue"
    """Where the questions stand: `dialogue` behind the chosen response, as further turns; `apart`
    each as a dialogue of its own about the same images, which sees neither that response nor the
    other questions."""
    devices: Devices = Devices()
    attention: Attention = "auto"
    """Of a corrector that is a checkpoint."""


class EvaluateRecipe(Base):
    """`mmpo evaluate`: a model measured by benchmarks."""

    lengths: Lengths | None = None
    """Bucket sizes; by default, and where a question fits none, those that the questions need."""
    evaluation: Benchmarks
