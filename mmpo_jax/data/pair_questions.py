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
_CONCLUSION = re.compile(
    r"\b(?:answer|response)\s*(1|2)\b[^.\n]*?\b(?:is|seems|would be)\b[^.\n]*?\b(better|worse)\b",
    re.IGNORECASE,
)


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
    answer better or worse; None where there is none."""
    reasoning = reply.partition("<answer>")[0]
    found = _CONCLUSION.findall(reasoning)
    if not found:
        return None
    place, word = found[-1]
    return "1" if (place == "1") == (word.lower() == "better") else "2"


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
