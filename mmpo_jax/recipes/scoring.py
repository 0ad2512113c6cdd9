"""How responses are scored: by their log-probs, by a reward model, and by DPO's own reward."""

from __future__ import annotations

from typing import Literal

import pydantic
from pydantic import Field

from mmpo_jax.core.sections import NonNegativeInt, PositiveInt, Section
from mmpo_jax.recipes.base import Template

ScoringDtype = Literal["auto", "float32", "bfloat16"]
"""`auto` is that of most weights, and float32 where that is float16: activations may pass its
range, and bfloat16 would drop digits that the weights have."""


class Scoring(Section):
    """How responses are scored."""

    batch_size: PositiveInt = 8
    """Rows at a time."""
    compute_dtype: ScoringDtype = "auto"
    tokens: bool = False
    """Writes the ids of prompts and responses too."""


class Rewarding(Section):
    """How a reward model scores responses."""

    critiques: NonNegativeInt | None = None
    """Critiques that the model writes of every response, over whose rewards the mean is taken. By
    default one if it was trained with critiques, else none."""
    given_critiques: bool = False
    """Reads the critiques of the data in place of its own."""
    temperature: float | None = Field(None, ge=0)
    """Of sampled critiques; by default 0, which is greedy, for one and 0.7 for several."""
    max_new_tokens: PositiveInt = 1024
    """Where a critique is cut off."""
    batch_size: PositiveInt = 8
    """Rows at a time, and prompts at a time where critiques are sampled."""
    compute_dtype: ScoringDtype = "auto"

    @pydantic.model_validator(mode="after")
    def _possible(self) -> Rewarding:
        if self.given_critiques and self.critiques:
            raise ValueError("critiques: those of the data are read; give one of the two")
        if self.temperature is not None and (self.given_critiques or self.critiques == 0):
            raise ValueError("temperature: no critique is sampled; leave it out")
        if (self.critiques or 0) > 1 and self.temperature == 0:
            raise ValueError(f"temperature: at 0 all {self.critiques} critiques would be the same")
        return self


class RewardModelAsked(Rewarding):
    """A reward model, and how it scores what was sampled."""

    model: str
    """Checkpoint with a reward head."""
    template: Template = "auto"
    """How dialogues become text."""

    @pydantic.model_validator(mode="after")
    def _writes(self) -> RewardModelAsked:
        if self.given_critiques:
            raise ValueError("given_critiques: of sampled responses nobody has written any")
        return self


class ImplicitReward(Section):
    """DPO's own reward of a response: `beta` times the log-ratio of policy and reference."""

    beta: float = Field(0.1, gt=0)
    """Factor of every reward; it changes no choice."""
    per_token: bool = True
    """Whether the log-ratio is divided by the response's number of tokens, EOS included."""
    compute_dtype: ScoringDtype = "auto"
    """Dtype of both models' passes; `auto` goes by the policy's weights."""
