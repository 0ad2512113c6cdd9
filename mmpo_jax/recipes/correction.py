"""Who corrects rejected responses: the `corrector` of a recipe for `mmpo correct`."""

from __future__ import annotations

from typing import Annotated, Literal

import pydantic
from pydantic import Field

from mmpo_jax.core.sections import PositiveInt, Section, check_places, type_by_default
from mmpo_jax.recipes.feedback import ChatAsked, CheckpointAsked, Judging, Speaking

Layout = Literal["dialogue", "apart"]
"""Where corrections stand, see `CorrectRecipe.layout`."""


class RuleCorrecting(Section):
    """Rules, for answers of a few words and for captions of the picture world, whose rows have the
    scene as their `answer`."""

    type: Literal["rule"] = "rule"
    max_words: PositiveInt = 12
    """Words of an answer; what is longer is for a language model to correct."""


class Correcting(Judging, Speaking):
    """How a language model is asked what is wrong with a response."""

    prompt: str | None = None
    """What is asked instead of the built-in prompt, with {question}, {chosen}, {rejected},
    {codebook} and {max_errors} in it."""
    show_image: bool = False
    """Whether the model is shown the row's images and videos too; else it compares the two
    responses."""

    @pydantic.model_validator(mode="after")
    def _tells_all(self) -> Correcting:
        places = ("{question}", "{chosen}", "{rejected}", "{codebook}", "{max_errors}")
        check_places("prompt", self.prompt, places)
        return self


class ChatCorrecting(ChatAsked, Correcting):
    """A served language model that finds errors and asks about them."""


class CheckpointCorrecting(CheckpointAsked, Correcting):
    """A checkpoint, of a text family too, that finds errors and asks about them."""

    model: str
    """Folder, hub id or bucket."""


Corrector = Annotated[
    RuleCorrecting | ChatCorrecting | CheckpointCorrecting,
    Field(discriminator="type"),
    pydantic.BeforeValidator(type_by_default("rule")),
]
