"""Rewards that a file has for the responses of benchmarks' rows, as `mmpo reward` writes them."""

from __future__ import annotations

import collections
import math
import re
from collections.abc import Iterable, Sequence

from mmpo_jax.benchmarks.tables import Row, as_id, said
from mmpo_jax.core.errors import MmpoError
from mmpo_jax.data.ids import RowIds
from mmpo_jax.data.pair_questions import read_verdict

Pair = tuple[float, float]

_REPEATED = re.compile(r" \(row \d+\)$")
"""What our commands write behind an id that an earlier row has."""
_ASKED = re.compile(r"(?P<name>.*)/(?P<first>[01])-[01]/(?P<order>[12])", re.DOTALL)
"""Id of one order of a pair as a question, see `data.pair_questions.pairs_as_questions`."""


def has_rewards(answers: Sequence[Row]) -> bool:
    """Whether the rows are rewards, or verdicts from which rewards are made, and no official form
    of a judge's words."""
    return are_replies(answers) or all(row.get("rewards") is not None for row in answers)


def are_replies(answers: Sequence[Row]) -> bool:
    """Whether the rows are replies to pairs as questions (`mmpo data convert --ask-which`)."""
    return all(
        row.get("responses") is not None and _ASKED.fullmatch(as_id(row.get("id"))) is not None
        for row in answers
    )


def pair_of(row: Row) -> Pair | None:
    """The two rewards of a row; None where one of them is null.

    Raises:
      MmpoError: they are not two finite numbers.
    """
    given = row.need("rewards")
    if not isinstance(given, Sequence) or isinstance(given, str) or len(given) != 2:
        raise MmpoError(f"{row.name}: `rewards` are not two numbers but {given!r:.80}")
    if None in given:
        return None
    try:
        first, second = (float(value) for value in given)
    except (TypeError, ValueError) as error:
        raise MmpoError(f"{row.name}: `rewards` are not two numbers but {given!r:.80}") from error
    if not (math.isfinite(first) and math.isfinite(second)):
        raise MmpoError(
            f"{row.name}: `rewards` are {given!r:.80}, no finite numbers; a response without a "
            "reward has null"
        )
    return first, second


def match_rewards(
    questions: Sequence[Row], answers: Sequence[Row], *keys: str
) -> list[tuple[Row, Pair | None]]:
    """(question, its rewards) of all questions in order; None of one without.

    Ids of questions may repeat. Where every answer has an id of its own, it is the name that our
    commands give the row, as `mmpo reward` writes it, and questions may lack an answer. Otherwise
    there is an answer to every question, in their order, and ids are only compared.

    Args:
      questions: of the benchmark.
      answers: rows with `rewards`, or replies to pairs as questions.
      keys: names of a question's id.

    Raises:
      MmpoError: rewards of no question, a number of rows or an id that is another one, or rewards
        that are no numbers.
    """
    if are_replies(answers):
        return _by_name(questions, _gains(answers), keys)
    given = [answer.get("id", *keys) for answer in answers]
    if None not in given and len({*map(as_id, given)}) == len(given):
        pairs = zip(map(as_id, given), answers, strict=True)
        return _by_name(questions, ((name, row, pair_of(row)) for name, row in pairs), keys)
    if len(questions) != len(answers):
        raise MmpoError(
            f"{answers[0].file}: has rewards of {len(answers)} rows, {questions[0].file} has "
            f"{len(questions)}; a row without rewards stands there with `rewards: [null, null]`"
        )
    for question, answer, name in zip(questions, answers, given, strict=True):
        own = as_id(question.need(*keys))
        if name is not None and _REPEATED.sub("", as_id(name)) != own:
            raise MmpoError(f"{answer.name}: has the id {name!r}, the question there has {own!r}")
    return [(question, pair_of(row)) for question, row in zip(questions, answers, strict=True)]


def _by_name(
    questions: Sequence[Row],
    answers: Iterable[tuple[str, Row, Pair | None]],
    keys: Sequence[str],
) -> list[tuple[Row, Pair | None]]:
    """Every question with the rewards of the row of its name."""
    found: dict[str, Pair | None] = {}
    names = _names(questions, keys)
    for name, row, pair in answers:
        if name not in names:
            raise MmpoError(
                f"{row.name}: {questions[0].file} has no row called {name!r}; are these rewards of "
                "other rows, or in another order?"
            )
        found[name] = pair
    return [(question, found.get(name)) for name, question in names.items()]


def _names(questions: Sequence[Row], keys: Sequence[str]) -> dict[str, Row]:
    """Name that our commands give a row -> the row; those of several files are numbered through."""
    ids, one_file = RowIds(), len({question.file for question in questions}) == 1
    return {
        ids.name(as_id(question.need(*keys)), question.number if one_file else place): question
        for place, question in enumerate(questions, start=1)
    }


def _gains(answers: Sequence[Row]) -> list[tuple[str, Row, Pair | None]]:
    """(name of a row, one of the replies, what both responses get of the point between them: the
    mean over the orders that can be read; None where none can)."""
    shares: dict[str, list[float]] = collections.defaultdict(list)
    rows: dict[str, Row] = {}
    for row in answers:
        asked = _ASKED.fullmatch(as_id(row.need("id")))
        assert asked is not None
        name = asked["name"]
        rows.setdefault(name, row)
        verdict = read_verdict(said(row))
        if verdict is not None:
            # The response that is better in the data is shown first in the order 1.
            shown_first = (asked["first"] == "0") == (asked["order"] == "1")
            prefers_shown = {"1": 1.0, "2": 0.0, "tie": 0.5}[verdict]
            shares[name].append(prefers_shown if shown_first else 1 - prefers_shown)
    return [
        (name, row, _shared(sum(shares[name]) / len(shares[name])) if shares[name] else None)
        for name, row in rows.items()
    ]


def _shared(first: float) -> Pair:
    return first, 1 - first
