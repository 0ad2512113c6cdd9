"""How responses are sampled, as recipes say it and the sampler takes it."""

from __future__ import annotations

from typing import Any

import pydantic
from pydantic import Field

from mmpo_jax.core.sections import PositiveInt, Section


class Decoding(Section):
    """How tokens are chosen; hashable, as it is compiled in."""

    num_samples: PositiveInt = 1
    temperature: float = Field(1.0, ge=0)
    """0 is greedy."""
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)
    """0 keeps all tokens."""
    max_new_tokens: PositiveInt = 64


class SampledDecoding(Decoding):
    """How several responses to a prompt are drawn."""

    num_samples: PositiveInt = 10
    """Samples of every prompt; 1 by default where `temperature` is 0, as all would be the same."""
    temperature: float = Field(0.7, ge=0)

    @pydantic.model_validator(mode="before")
    @classmethod
    def _greedy(cls, options: Any) -> Any:
        if isinstance(options, dict) and options.get("temperature") == 0:
            return {"num_samples": 1, **options}
        return options


class Sampling(SampledDecoding):
    """How responses are drawn."""

    batch_size: PositiveInt = 16
    """Prompts at a time."""


class BestOfNSampling(SampledDecoding):
    """How the responses are drawn of which the best one is taken."""

    num_samples: PositiveInt = 16
    max_new_tokens: PositiveInt = 512


class LongSampling(Sampling):
    """How responses of any kind are drawn: where nothing is known of them, room for a paragraph."""

    max_new_tokens: PositiveInt = 512
