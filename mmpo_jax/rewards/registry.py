"""The registry of rewards: name -> function and options.

A reward is a function (text, solution, **options) -> float, most of them from 0 to 1. `text` is
what the model said and may be anything: what cannot be read is worth 0 and raises nothing.
`solution` is what the record says is right; one that a reward cannot use is a `DataError`. One that
sees more is a function (question, texts, **options), see `reward_of_texts`, and one of sampled
tokens a function (ids, **options), see `reward_of_tokens`. The docstring begins with what a text is
worth and goes on with the source; `mmpo objectives` prints both.

On-policy objectives learn from rewards (`rollout: rewards`), and rounds make pairs of them
(`feedback`).
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from mmpo_jax.core.errors import DataError
from mmpo_jax.core.sections import keyword_options
from mmpo_jax.data.records import ImageRef, VideoRef
from mmpo_jax.objectives.registry import check_nothing

MAX_LENGTH = 100_000
"""Characters; a longer text is worth 0 and not read."""


@dataclasses.dataclass(frozen=True)
class Question:
    """What texts answer."""

    id: str
    text: str
    """What the user says last."""
    images: tuple[ImageRef, ...]
    """Its images, in order; `PIL.Image.open(io.BytesIO(image.read()))` opens one."""
    solution: Any = None
    """What the data say is right; None where they say nothing."""
    videos: tuple[VideoRef, ...] = ()
    """Its videos, in order; `mmpo_jax.data.videos.spread_frames(video, 8)` gives images."""


@dataclasses.dataclass(frozen=True)
class Value:
    """What a text is worth."""

    score: float
    """More is better; NaN for no verdict."""
    details: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """What a person may want to see of it, as JSON."""


@dataclasses.dataclass(frozen=True)
class Silent:
    """Samples that a reward of tokens does not tell apart: all are worth 0."""

    tokens: int
    """Most that they have."""
    options: str
    """Options that this follows from, in words."""


def _never(options: Mapping[str, Any]) -> Silent | None:
    return None


@dataclasses.dataclass(frozen=True)
class Reward:
    """A reward by its name."""

    name: str
    function: Callable[..., Any]
    solution: str
    """What a record's solution has to be, in words."""
    reads: Literal["text", "texts", "tokens"] = "text"
    """What the function takes: a text and a solution, a question and all texts that answer it, or
    the ids that were sampled."""
    check: Callable[[Mapping[str, Any]], None] = check_nothing
    """Raises ValueError for options that do not fit together."""
    silent: Callable[[Mapping[str, Any]], Silent | None] = _never
    """Up to which length it is 0 whatever was said, if there is one, by the options."""

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
        """What a text is worth, by a reward of one text.

        Raises:
          DataError: the solution is not what the reward compares with.
        """
        return float(self.function(text[: MAX_LENGTH + 1], solution, **options))

    def values(
        self,
        question: Question,
        texts: Sequence[str],
        tokens: Sequence[Sequence[int]] = (),
        **options: Any,
    ) -> list[Value]:
        """What every text is worth as an answer to a question.

        Args:
          question: that they answer.
          texts: what was said.
          tokens: ids of every text as they were sampled, the end of the response included, for
            rewards that read them.
          **options: of the reward.

        Raises:
          DataError: the solution is not what the reward compares with, or a function of the user's
            gives something else than a value for each text.
        """
        if self.reads == "tokens":
            found = [self.function(ids, **options) for ids, _ in zip(tokens, texts, strict=True)]
            return [Value(float(score)) for score in found]
        if self.reads == "text":
            return [Value(self.score(text, question.solution, **options)) for text in texts]
        name = f"{options.get('function', self.name)}, prompt {question.id!r}"
        return _as_values(self.function(question, texts, **options), len(texts), name)


def _as_values(given: Any, count: int, name: str) -> list[Value]:
    """Numbers, None for no verdict, or mappings with a `score` and details, as values."""
    try:
        values = [_as_value(one) for one in given]
    except (TypeError, ValueError, KeyError) as error:
        raise DataError(
            f"{name}: a reward gives a number, None, or a mapping with `score` for every text, "
            f"not {given!r:.200}"
        ) from error
    if len(values) != count:
        raise DataError(f"{name}: a reward gave {len(values)} values for {count} texts")
    infinite = [value.score for value in values if math.isinf(value.score)]
    if infinite:
        raise DataError(f"{name}: a reward gave {infinite[0]}; one without a verdict is None")
    return values


def _as_value(given: Any) -> Value:
    if isinstance(given, Mapping):
        details = {key: value for key, value in given.items() if key != "score"}
        return dataclasses.replace(_as_value(given["score"]), details=details)
    return Value(math.nan if given is None else float(given))


REWARDS: dict[str, Reward] = {}


def reward(solution: str) -> Callable[[Callable[..., float]], Callable[..., float]]:
    """Registers a reward under its function's name; `solution` as in `Reward`."""

    def add(function: Callable[..., float]) -> Callable[..., float]:
        REWARDS[function.__name__] = Reward(function.__name__, function, solution)
        return function

    return add


def reward_of_texts(solution: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a function (question, texts, **options) that gives a number, or None for no
    verdict, or a mapping with `score` and details, for every text; `solution` as in `Reward`."""

    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        REWARDS[function.__name__] = Reward(function.__name__, function, solution, "texts")
        return function

    return add


def reward_of_tokens(
    check: Callable[[Mapping[str, Any]], None] = check_nothing,
    silent: Callable[[Mapping[str, Any]], Silent | None] = _never,
) -> Callable[[Callable[..., float]], Callable[..., float]]:
    """Registers a function (ids, **options) -> float of a response's ids as they were sampled, the
    end of the response included; for rollouts, as other responses have none. `check` and `silent`
    as in `Reward`."""
    solution = "anything, or none: it is not read"

    def add(function: Callable[..., float]) -> Callable[..., float]:
        name = function.__name__
        REWARDS[name] = Reward(name, function, solution, "tokens", check, silent)
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
