"""Who judges answers to benchmarks: the `judge` of an evaluation."""

from __future__ import annotations

from typing import Annotated, Any

import pydantic
from pydantic import Field

from mmpo_jax.core.sections import PositiveInt, Section, Seed
from mmpo_jax.recipes.feedback import ChatAsked, CheckpointAsked, Judging


class BenchmarkJudging(Judging):
    """How a judge is asked where the benchmark's authors are not to be followed."""

    temperature: float | None = Field(None, ge=0)
    """Of its replies; None is that of the benchmark's own script, as in the options below."""
    top_p: float | None = Field(None, gt=0, le=1)
    """Of the probability, what is kept."""
    max_new_tokens: PositiveInt | None = None
    """Of a reply; a judge that thinks before it speaks needs more."""
    attempts: PositiveInt | None = None
    """How often a reply that cannot be read is asked for, the first time included."""
    seed: Seed = 0
    """Of its replies, where they are sampled and the server knows seeds."""


class ChatJudging(ChatAsked, BenchmarkJudging):
    """A served judge."""


class CheckpointJudging(CheckpointAsked, BenchmarkJudging):
    """A checkpoint, of a text family too, as a judge."""

    model: str
    """Folder, hub id or bucket."""


def _served_if_it_has_an_address(value: Any) -> Any:
    """The section with its `type` where it names none."""
    if not isinstance(value, dict):
        return value
    return {"type": "chat" if "url" in value else "checkpoint", **value}


BenchmarkJudge = Annotated[
    ChatJudging | CheckpointJudging,
    Field(discriminator="type"),
    pydantic.BeforeValidator(_served_if_it_has_an_address),
]
"""One judge, by `type`: `chat` where it has an address, else `checkpoint`."""


class JudgedAnswers(Section):
    """The options of a command whose answers are judged."""

    judge: BenchmarkJudge
