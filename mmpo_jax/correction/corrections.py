"""Corrections of a rejected response: two questions about every error, behind the chosen response.

The data of nSFT (Zhu et al. 2024, arXiv 2411.14797). As many answers are yes as no by construction:
an error is asked about twice, once by what is so and once by what was said.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from mmpo_jax.core.files import fingerprint_json
from mmpo_jax.data.records import (
    ImageRef,
    Record,
    Response,
    Turn,
    VideoRef,
    question_with_beginning,
)
from mmpo_jax.data.skipped import SkipReason, UnusableRow
from mmpo_jax.recipes.correction import Layout

Answers = tuple[str, str]
"""What yes and no are called."""

ERRORS = "errors"
"""Column of a corrected row that says what was wrong."""


@dataclasses.dataclass(frozen=True)
class Error:
    """Something wrong in a rejected response."""

    kind: str
    """Name in the codebook, or `SHORT_ANSWER`."""
    wrong: str
    """What the response says."""
    yes: str
    """Question whose true answer is yes."""
    no: str
    """Question whose true answer is no."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A pair as correctors are asked about it."""

    id: str
    question: str
    chosen: str
    rejected: str
    images: tuple[ImageRef, ...] = ()
    videos: tuple[VideoRef, ...] = ()
    solution: Any = None
    """What the row has as its answer: of the picture world the scene."""


@dataclasses.dataclass(frozen=True)
class Found:
    """What is wrong with a rejected response."""

    errors: tuple[Error, ...] = ()
    reason: SkipReason | None = None
    """Why there is no error; None where there is one."""
    detail: str = ""
    """What exactly, for a person."""
    failure: str | None = None
    """Where nobody could say it: the word that failures are counted by."""
    raw: str | None = None
    """The last reply of a model that could not be read."""


def pair_of(record: Record) -> tuple[Response, Response]:
    """(chosen, rejected): the first of the best rank and the first of the worst.

    Raises:
      UnusableRow: there are no two such responses to one prompt about the same images, or the
        chosen one was cut, so that nothing can stand behind it.
    """
    if not record.ranked or len({response.rank for response in record.responses}) < 2:
        raise UnusableRow("incomplete_pair", "no responses of different ranks")
    if not record.prompt:
        raise UnusableRow("no_prompt", "the row's responses do not share a prompt")
    ranks = [response.rank or 0 for response in record.responses]
    chosen = record.responses[ranks.index(min(ranks))]
    rejected = record.responses[ranks.index(max(ranks))]
    for response in (chosen, rejected):
        if response.prompt is not None:
            raise UnusableRow("own_prompt", "a response has a prompt of its own")
        if response.images is not None:
            raise UnusableRow("own_images", "a response has images of its own")
    if not chosen.finished:
        raise UnusableRow("unfinished", "the chosen response was cut, and nothing can follow it")
    return chosen, rejected


def case_of(record: Record, layout: Layout) -> Case:
    """What correctors are asked about a record that is to be laid out so.

    Raises:
      UnusableRow: see `pair_of`, or a dialogue apart would have half an answer.
    """
    chosen, rejected = pair_of(record)
    if layout == "apart" and record.prompt[-1].role == "assistant":
        detail = "the prompt ends with the beginning of an answer; layout dialogue takes it"
        raise UnusableRow("turn_order", detail)
    question = question_with_beginning(record.prompt)
    said = chosen.text, rejected.text
    return Case(record.id, question, *said, record.images, record.videos, record.solution)


def kept(errors: Iterable[Error], max_errors: int) -> tuple[Error, ...]:
    """The first few errors both of whose questions are new, so that no question is asked twice and
    the answers stay balanced."""
    asked: set[str] = set()
    chosen: list[Error] = []
    for error in errors:
        questions = {plain(error.yes), plain(error.no)}
        if len(chosen) < max_errors and not asked & questions:
            chosen.append(error)
            asked |= questions
    return tuple(chosen)


def plain(text: str) -> str:
    """A text without what two spellings of it may differ by: case and blanks."""
    return " ".join(text.casefold().split())


def exchanges_of(
    errors: Sequence[Error], answers: Answers, seed: int, name: str
) -> list[tuple[Turn, Turn]]:
    """Every error's two questions with their answers, in an order drawn by the seed.

    Were it always the same, the place of an answer would give it away.

    Args:
      errors: of a response.
      answers: what is answered.
      seed: of the run.
      name: of the row.
    """
    yes, no = answers
    said = [(error.yes, yes) for error in errors] + [(error.no, no) for error in errors]
    return [
        (Turn("user", said[place][0]), Turn("assistant", said[place][1]))
        for place in drawn_order(len(said), seed, name)
    ]


def drawn_order(count: int, seed: int, name: str) -> list[int]:
    """Places 0 to `count` - 1 in an order that depends on the seed and a row's name alone."""
    digest = int(fingerprint_json([seed, name])[:16], 16)
    return np.random.default_rng(digest).permutation(count).tolist()


def corrected(
    record: Record, errors: Sequence[Error], answers: Answers, seed: int, layout: Layout
) -> Record:
    """A record to train nSFT on.

    Args:
      record: with chosen and rejected responses, see `pair_of`.
      errors: of the rejected one.
      answers: to the questions.
      seed: of the order of the questions.
      layout: `dialogue` gives the chosen response with the questions as further turns, and the
        rejected one as it was; `apart` dialogues about the same images, which share these alone:
        the prompt with the chosen response, and one for each question.
    """
    chosen, rejected = pair_of(record)
    exchanges = exchanges_of(errors, answers, seed, record.id)
    told = {**record.extra, ERRORS: [dataclasses.asdict(error) for error in errors]}
    if layout == "dialogue":
        turns = (*chosen.turns, *(turn for exchange in exchanges for turn in exchange))
        first = _going_on(chosen, turns)
        return dataclasses.replace(record, responses=(first, rejected), extra=told)
    system = tuple(turn for turn in record.prompt if turn.role in ("system", "developer"))
    before = tuple(
        dataclasses.replace(turn, learned=False) if turn.role == "assistant" else turn
        for turn in record.prompt
    )
    responses = [
        dataclasses.replace(_going_on(chosen, (*before, *chosen.turns)), rank=None, scores={}),
        *(Response((*system, *exchange)) for exchange in exchanges),
    ]
    return dataclasses.replace(record, prompt=(), responses=tuple(responses), extra=told)


def _going_on(response: Response, turns: tuple[Turn, ...]) -> Response:
    """A response with other turns, without what was said of its own alone."""
    return dataclasses.replace(response, turns=turns, spans=(), log_prob=None, token_ids=None)
