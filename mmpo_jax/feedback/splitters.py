"""Divide: a response becomes claims, each with a yes/no question that checks it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from mmpo_jax.core.prompts import fill
from mmpo_jax.feedback.judge import EMPTY
from mmpo_jax.feedback.split_prompts import (
    CLAIMS_PROMPT,
    CLAIMS_SCHEMA,
    FACTS_PROMPT,
    QUESTIONS_PROMPT,
    WHOLE_PROMPT,
    as_list,
    read_claims,
    read_list,
)
from mmpo_jax.feedback.text_model import (
    Ask,
    TextModel,
    Unread,
    UnreadableReply,
    ask_until_read,
    speaking_key,
)
from mmpo_jax.picture_world import claims as world_claims
from mmpo_jax.recipes.feedback import Splitting

COUNT_DIFFERS = "counts_differ"
SPLIT_RULES = 1
"""Part of the key of claims: changes with how replies are asked for and read."""


@dataclasses.dataclass(frozen=True)
class Claim:
    """One thing a response says about the image."""

    text: str
    question: str
    """Answered with yes where the claim is true."""


@dataclasses.dataclass(frozen=True)
class Division:
    """The claims of a response, and what could not be read as claims."""

    claims: tuple[Claim, ...]
    unparsed: tuple[str, ...] = ()
    """Pieces that say nothing clear, which count as rejected claims."""
    failure: str | None = None
    """Why the response could not be split: a word that is counted."""
    raw: str | None = None
    """The last reply that could not be read."""


@dataclasses.dataclass(frozen=True)
class SplitItem:
    """A response to split."""

    id: str
    """Name that no other response of the round has."""
    question: str
    response: str


class Splitter(Protocol):
    """Divides responses; an implementation may be a rule or a language model."""

    key: Any
    """All that its claims depend on, as JSON."""

    def divide(self, items: Sequence[SplitItem]) -> list[Division]:
        """The claims of every response, in order."""
        ...

    def release(self) -> None:
        """Lets go of what it holds on the devices."""


class PictureWorldSplitter:
    """The rule for captions of the picture world: one claim per group that is mentioned, or one
    claim that has them all."""

    def __init__(self, whole: bool = False):
        """
        Args:
          whole: whether all groups of a caption are one claim.
        """
        self.whole = whole
        self.key = "picture_world-whole-1" if whole else "picture_world-2"

    def divide(self, items: Sequence[SplitItem]) -> list[Division]:
        """The claims of every response, in order."""
        return [self._divide(item.response) for item in items]

    def release(self) -> None:
        """Nothing: a rule holds nothing."""

    def _divide(self, response: str) -> Division:
        parsed = world_claims.parse(response)
        if self.whole and parsed.claims:
            question = world_claims.question_about_all(parsed.claims)
            return Division((Claim(response.strip(), question),), parsed.unparsed)
        claims = tuple(Claim(claim.text, world_claims.question(claim)) for claim in parsed.claims)
        return Division(claims, parsed.unparsed)


class WholeSplitter:
    """No splitter: a response is one claim, and the question is whether it is right in all."""

    def __init__(self, prompt: str | None = None):
        """
        Args:
          prompt: the question, with {answer} in it; None for `WHOLE_PROMPT`.
        """
        self.prompt = prompt or WHOLE_PROMPT
        self.key = ["whole", self.prompt]

    def divide(self, items: Sequence[SplitItem]) -> list[Division]:
        """Every response as its one claim, in order; one that says nothing has a failure."""
        return [
            Division((Claim(item.response, self._ask(item)),))
            if item.response.strip()
            else Division((), failure=EMPTY)
            for item in items
        ]

    def release(self) -> None:
        """Nothing: a rule holds nothing."""

    def _ask(self, item: SplitItem) -> str:
        return fill(self.prompt, question=item.question, answer=item.response)


class ModelSplitter:
    """A language model that is asked for claims and questions together (style `json`)."""

    def __init__(self, model: TextModel, options: Splitting, key: Any):
        """
        Args:
          model: that is asked.
          options: how.
          key: of the model.
        """
        self.model, self.options = model, options
        self.prompt = options.prompt or CLAIMS_PROMPT
        self.key = [SPLIT_RULES, key, speaking_key(options), self.prompt]

    def divide(self, items: Sequence[SplitItem]) -> list[Division]:
        """The claims of every response, in order; one that nobody can read has a failure."""

        def read(_: int, reply: str) -> Division:
            return Division(tuple(Claim(*pair) for pair in read_claims(reply)))

        def divide_said(said: Sequence[SplitItem]) -> list[Division | Unread]:
            asks = [_ask(item, self.prompt, self.options) for item in said]
            attempts = self.options.attempts
            return ask_until_read(self.model, asks, read, attempts, CLAIMS_SCHEMA)

        return _where_said(items, divide_said)

    def release(self) -> None:
        """Lets go of the model."""
        self.model.release()


class RlaifVSplitter:
    """RLAIF-V's pair of models: one lists facts, the other turns them into questions."""

    def __init__(self, facts: TextModel, questions: TextModel, options: Splitting, key: Any):
        """
        Args:
          facts: lists the facts of a response.
          questions: turns a list of facts into one of questions.
          options: how they are asked.
          key: of both models.
        """
        self.facts, self.questions, self.options = facts, questions, options
        self.facts_prompt = options.prompt or FACTS_PROMPT
        self.questions_prompt = options.question_prompt or QUESTIONS_PROMPT
        prompts = [self.facts_prompt, self.questions_prompt]
        self.key = [SPLIT_RULES, key, speaking_key(options), prompts]

    def divide(self, items: Sequence[SplitItem]) -> list[Division]:
        """The claims of every response, in order. Facts and questions that differ in number are a
        failure of the response, never put together by position."""
        return _where_said(items, self._divide_said)

    def release(self) -> None:
        """Lets go of both models."""
        self.facts.release()
        self.questions.release()

    def _divide_said(self, items: Sequence[SplitItem]) -> list[Division | Unread]:
        asks = [_ask(item, self.facts_prompt, self.options) for item in items]
        attempts = self.options.attempts
        facts = ask_until_read(self.facts, asks, lambda _, reply: read_list(reply), attempts)
        listed = [(place, found) for place, found in enumerate(facts) if isinstance(found, list)]

        def read_questions(number: int, reply: str) -> Division:
            return _with_questions(listed[number][1], read_list(reply))

        asks = [
            Ask(
                f"{items[place].id}/questions",
                fill(self.questions_prompt, facts=as_list(found)),
                max_new_tokens=self.options.max_new_tokens,
            )
            for place, found in listed
        ]
        divisions: list[Division | Unread] = [
            Unread("", "", None) if isinstance(found, list) else found for found in facts
        ]
        asked = ask_until_read(self.questions, asks, read_questions, attempts)
        for (place, _), division in zip(listed, asked, strict=True):
            divisions[place] = division
        return divisions


def _with_questions(facts: Sequence[str], questions: Sequence[str]) -> Division:
    if len(facts) != len(questions):
        detail = f"{len(questions)} questions for {len(facts)} facts"
        raise UnreadableReply(COUNT_DIFFERS, detail)
    return Division(tuple(map(Claim, facts, questions)))


def _ask(item: SplitItem, prompt: str, options: Splitting) -> Ask:
    text = fill(prompt, question=item.question, answer=item.response)
    return Ask(item.id, text, max_new_tokens=options.max_new_tokens)


def _where_said(
    items: Sequence[SplitItem],
    divide: Callable[[Sequence[SplitItem]], list[Division | Unread]],
) -> list[Division]:
    """Divisions of all responses; one that says nothing is a failure that nobody is asked about."""
    divided = iter(divide([item for item in items if item.response.strip()]))
    return [
        _division(next(divided)) if item.response.strip() else Division((), failure=EMPTY)
        for item in items
    ]


def _division(found: Division | Unread) -> Division:
    if isinstance(found, Division):
        return found
    raw = found.raw if found.raw is not None else found.detail
    return Division((), failure=found.reason, raw=raw)
