"""The codebook: which errors are looked for in rejected responses; users can replace it."""

from __future__ import annotations

import os
from typing import Annotated, Literal

import pydantic
from pydantic import Field

from mmpo_jax.core.sections import Section
from mmpo_jax.recipes.files import load_recipe

SHIPPED = os.path.join(os.path.dirname(__file__), "codebook.yaml")
LEVELS = {"instance": "Errors about single things:", "image": "Errors about the image as a whole:"}
"""Levels of errors, and what is said in front of those of one."""

Text = Annotated[str, Field(min_length=1, pattern=r"\S")]


class Example(Section):
    """An error of a kind, and the two questions about it."""

    wrong: Text
    """What a response says."""
    question_yes: Text  # `yes` alone is true in YAML
    """Question about what is so, whose answer is yes."""
    question_no: Text
    """Question about what the response says, whose answer is no."""


class ErrorKind(Section):
    """A kind of errors."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    """Word by which replies name it, and by which it is counted."""
    level: Literal["instance", "image"]
    meaning: Text
    """What it is, as a language model is told."""
    example: Example | None = None


class Codebook(Section):
    """All kinds of errors, and how rules and answers are worded."""

    errors: tuple[ErrorKind, ...] = Field(min_length=1)
    short_answers: tuple[Text, ...] = ()
    """Yes/no questions of rules, with {question} and {answer} in them: whether a short answer is
    right."""
    answer_yes: Text = "Yes"
    answer_no: Text = "No"

    @pydantic.model_validator(mode="after")
    def _clear(self) -> Codebook:
        names = [error.name for error in self.errors]
        repeated = [name for name in names if names.count(name) > 1]
        if repeated:
            raise ValueError(f"errors: {repeated[0]} stands twice; an error has one entry")
        for number, wording in enumerate(self.short_answers):
            for place in ("{question}", "{answer}"):
                if place not in wording:
                    raise ValueError(f"short_answers.{number}: it has no {place}")
        if self.answer_yes == self.answer_no:
            raise ValueError("answer_no: it is the same as answer_yes")
        return self

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the kinds, in order."""
        return tuple(error.name for error in self.errors)

    @property
    def answers(self) -> tuple[str, str]:
        """What yes and no are called."""
        return self.answer_yes, self.answer_no

    def listing(self) -> str:
        """The kinds as a language model is told them, by level."""
        lines = []
        for level, heading in LEVELS.items():
            kinds = [error for error in self.errors if error.level == level]
            lines += [heading] if kinds else []
            lines += [line for kind in kinds for line in _lines(kind)]
        return "\n".join(lines)


def load_codebook(path: str | None) -> Codebook:
    """The codebook of a file, by default the one that is shipped.

    Raises:
      RecipeError: naming the file and every key at fault.
    """
    file = SHIPPED if path is None else path
    return load_recipe(Codebook, file, told="this codebook cannot be used")


def _lines(kind: ErrorKind) -> list[str]:
    lines = [f"- {kind.name}: {kind.meaning}."]
    if kind.example is not None:
        shown = kind.example
        lines.append(
            f'  Such as "{shown.wrong}", with the questions "{shown.question_yes}" (yes) and '
            f'"{shown.question_no}" (no).'
        )
    return lines
