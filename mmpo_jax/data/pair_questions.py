"""Which of two answers is better: how it is asked, how a reply is read, pairs as such questions.

A judge in words is asked so (`feedback/pair_judge.py`), and trained so: R1-Reward (Zhang et al.
2025, arXiv 2505.02835) learns the verdict by reinforcement from pairs that people have compared.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator
from typing import Literal

from mmpo_jax.core.prompts import fill
from mmpo_jax.data.records import Record, Response, Turn, question_with_beginning
from mmpo_jax.data.skipped import Problem

Verdict = Literal["1", "2", "tie"]
"""The better answer by its place."""

PAIR_PROMPT = """\
Here are a question about what is shown and two answers to it. Decide which of them is better: \
which one does what was asked, says what is to be seen and nothing that is not, and is clear. The \
order of the answers means nothing, and neither does their length.

Question: {question}

Answer 1: {first}

Answer 2: {second}

Think it over first, and end with the number of the better answer, in this form:
<think> what speaks for and against them </think><answer> 1 </answer>"""

_ENDINGS = (
    re.compile(r"<answer>[\s*\[]*(?:answer\s*)?(1|2|tie)[\s*.\]]*</answer>", re.IGNORECASE),
    re.compile(r"\[\[(A|B|C)\]\]"),
    re.compile(
        r"(?:overall judgment|therefore|verdict)\b[^.\n]*?\banswer\s*(1|2)\s*is\s*"
        r"(?:the\s*)?(?:slightly\s*)?better",
        re.IGNORECASE,
    ),
)
"""Forms of a verdict, the strictest first: of R1-Reward, of judges of text, of VL-RewardBench."""
_LETTERS = {"A": "1", "B": "2", "C": "tie"}
_SENTENCE = re.compile(r"([^.!?\n]+)([.!?\n]?)")
_PLACE = re.compile(r"\b(?:answer|response)\s*([12])\b", re.IGNORECASE)
_JUDGED = re.compile(r"\b(better|worse)\b", re.IGNORECASE)
_DENIED = re.compile(r"\b(?:not|no|never|neither|hardly)\b|n't\b", re.IGNORECASE)


def ask_which(question: str, first: str, second: str, prompt: str = PAIR_PROMPT) -> str:
    """The text that a judge is asked.

    Args:
      question: that both answer.
      first, second: the answers.
      prompt: with {question}, {first} and {second} in it.
    """
    return fill(prompt, question=question, first=first, second=second)


def read_verdict(reply: str) -> Verdict | None:
    """The verdict of a judge's reply: the last one of the strictest form that it has; None where it
    has none."""
    for ending in _ENDINGS:
        found = ending.findall(reply)
        if found:
            last = _LETTERS.get(found[-1], found[-1].lower())
            return "1" if last == "1" else "2" if last == "2" else "tie"
    return None


def read_conclusion(reply: str) -> Verdict | None:
    """What the reasoning in front of a verdict comes to: the last sentence of it that calls an
    answer better or worse, the one that is named last before that word; None where there is none.
    Questions and denials count as no such sentence.
    """
    for text, end in reversed(_SENTENCE.findall(reply.partition("<answer>")[0])):
        judged = None if end == "?" else _last(_JUDGED, text, len(text))
        place = None if judged is None else _last(_PLACE, text, judged.start())
        if judged is None or place is None or _DENIED.search(text, place.end(), judged.start()):
            continue
        return "1" if (place[1] == "1") == (judged[1].lower() == "better") else "2"
    return None


def _last(pattern: re.Pattern[str], text: str, end: int) -> re.Match[str] | None:
    """The last match in front of a character."""
    return max(pattern.finditer(text, 0, end), key=re.Match.start, default=None)


def unfit_for_questions(record: Record) -> Problem | None:
    """Why a record's responses cannot be compared in a question; None where they can."""
    if not record.prompt:
        return "no_prompt", "the row's responses do not share a prompt"
    if sum(turn.role == "user" for turn in record.prompt) > 1:
        return "several_turns", "a question is about one question, and the prompt has several turns"
    for response in record.responses:
        if response.prompt is not None:
            return "own_prompt", "a response has a prompt of its own"
        if response.images is not None:
            return "own_images", "a response has images of its own"
        if len(response.turns) > 1:
            return "several_turns", "a response has several turns"
    return None


def pairs_as_questions(records: Iterable[Record]) -> Iterator[Record]:
    """Every two responses of which one is better, as a question which, in both orders.

    A question has the media of its record, the place of the better answer as its `solution`, and
    the record's id with the ranks' places behind it. Records without ranks give none.
    """
    for record in records:
        ranked = [response for response in record.responses if response.rank is not None]
        for one, better in enumerate(ranked):
            for other, worse in enumerate(ranked):
                if better.rank is not None and worse.rank is not None and better.rank < worse.rank:
                    name = f"{record.id}/{one}-{other}"
                    yield _question(record, f"{name}/1", (better, worse), "1")
                    yield _question(record, f"{name}/2", (worse, better), "2")


def _question(
    record: Record, name: str, shown: tuple[Response, Response], solution: Verdict
) -> Record:
    first, second = (response.text for response in shown)
    text = ask_which(question_with_beginning(record.prompt), first, second)
    return dataclasses.replace(
        record,
        id=name,
        own_id=None,
        prompt=(Turn("user", text),),
        responses=(),
        extra={"solution": solution},
    )
