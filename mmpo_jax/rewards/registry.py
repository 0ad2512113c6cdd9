"""The registry of rewards: name -> function and options.

A reward is a function (text, solution, **options) -> float, most of them from 0 to 1. `text` is
what the model said and may be anything: what cannot be read is worth 0 and raises nothing.
`solution` is what the record says is right; one that a reward cannot use is a `DataError`. The
docstring begins with what a text is worth and goes on with the source; `mmpo objectives` prints
both.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

from mmpo_jax.core.sections import keyword_options

MAX_LENGTH = 100_000
"""Characters; a longer text is worth 0 and not read."""


@dataclasses.dataclass(frozen=True)
class Reward:
    """A reward by its name."""

    name: str
    function: Callable[..., float]
    solution: str
    """What a record's solution has to be, in words."""

    @property
    def options(self) -> dict[str, tuple[Any, Any]]:
        """Options of a recipe: name -> (type, default)."""
        return keyword_options(self.function)

    @property
    def formula(self) -> str:
        return self._paragraph(0)

    @property
    def source(self) -> str:
        return self._paragraph(1)

    def _paragraph(self, number: int) -> str:
        paragraphs = (inspect.getdoc(self.function) or "").split("\n\n")
        return paragraphs[number].replace("\n", " ") if number < len(paragraphs) else ""

    def score(self, text: str, solution: Any, **options: Any) -> float:
        """What a text is worth.

        Raises:
          DataError: the solution is not what the reward compares with.
        """
        return float(self.function(text[: MAX_LENGTH + 1], solution, **options))


REWARDS: dict[str, Reward] = {}


def reward(solution: str) -> Callable[[Callable[..., float]], Callable[..., float]]:
    """Registers a reward under its function's name; `solution` as in `Reward`."""

    def add(function: Callable[..., float]) -> Callable[..., float]:
        REWARDS[function.__name__] = Reward(function.__name__, function, solution)
        return function

    return add


def between(text: str, start: str, end: str) -> str | None:
    """What stands between the first `start` and the next `end`; None without them."""
    _, found, rest = text.partition(start)
    inside, closed, _ = rest.partition(end)
    return inside if found and closed else None


def final_answer(text: str) -> str:
    """What stands in `<answer>` tags, or the whole text; empty where it is too long."""
    if len(text) > MAX_LENGTH:
        return ""
    inside = between(text, "<answer>", "</answer>")
    return text if inside is None else inside
