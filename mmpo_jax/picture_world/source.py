"""The picture world as a source of records that a recipe can name."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from mmpo_jax.core.sections import PositiveInt, Section, Seed


class ShapesData(Section):
    """Scenes of the built-in picture world."""

    source: Literal["shapes"] = "shapes"
    split: Literal["train", "align", "validation", "test"] = "train"
    size: PositiveInt = 1000
    seed: Seed = 0
    image_size: int = Field(48, ge=24)  # below, shapes could not be told apart
    questions: int = Field(3, ge=0)
    """Yes/no questions per scene in supervised data and in evaluation."""
    hallucination_rate: float = Field(0.5, ge=0, le=1)
    """Share of supervised captions with one invented thing."""
