"""The section of a recipe that says whose distributions a distillation learns."""

from __future__ import annotations

from typing import Annotated, Literal

import pydantic
from pydantic import Field

from mmpo_jax.core.sections import PositiveInt, Section
from mmpo_jax.recipes.base import Template


class _Seeing(Section):
    """What a teacher sees that the policy does not."""

    image: Literal["same", "data"] = "same"
    """What it sees: the policy's images, or in their place the other images that rows give, such
    as an enlarged crop of what matters."""
    hint: str | None = None
    """Text that ends its last question, in which `{answer}` is the row's `answer` or `solution`."""
    prompt_lengths: tuple[PositiveInt, ...] | None = Field(None, min_length=1)
    """Sizes that its prompts are padded to; by default `lengths.prompt`."""

    @pydantic.field_validator("hint")
    @classmethod
    def _tells(cls, hint: str | None) -> str | None:
        if hint is not None and "{answer}" not in hint:
            raise ValueError("says nothing without {answer}")
        return hint

    @pydantic.field_validator("prompt_lengths")
    @classmethod
    def _ascending(cls, sizes: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if sizes is not None and list(sizes) != sorted(set(sizes)):
            raise ValueError("give ascending sizes")
        return sizes


class ModelTeacher(_Seeing):
    """Another checkpoint with the policy's tokenizer; its architecture may differ."""

    type: Literal["model"] = "model"
    model: str
    """As the recipe's `model`. It is on the devices beside the policy, frozen, in the recipe's
    `compute_dtype`."""
    template: Template = "auto"
    """How dialogues become its text."""


class SelfTeacher(_Seeing):
    """The policy's own reference (`reference: online` or `ema`), which sees more than it."""

    type: Literal["self"] = "self"

    @pydantic.model_validator(mode="after")
    def _sees_more(self) -> SelfTeacher:
        if self.image == "same" and self.hint is None:
            raise ValueError("a teacher of type self has to see more: give image or hint")
        return self


Teacher = Annotated[ModelTeacher | SelfTeacher, Field(discriminator="type")]
