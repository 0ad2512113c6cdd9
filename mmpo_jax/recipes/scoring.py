"""How responses are scored: by their log-probs, and by DPO's own reward."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from mmpo_jax.core.sections import PositiveInt, Section

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


class ImplicitReward(Section):
    """DPO's own reward of a response: `beta` times the log-ratio of policy and reference."""

    beta: float = Field(0.1, gt=0)
    """Factor of every reward; it changes no choice."""
    per_token: bool = True
    """Whether the log-ratio is divided by the response's number of tokens, EOS included."""
    compute_dtype: ScoringDtype = "auto"
    """Dtype of both models' passes; `auto` goes by the policy's weights."""
