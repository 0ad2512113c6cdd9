"""Rewards that a file has for the responses of benchmarks' rows, as `mmpo reward` writes them."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from mmpo_jax.benchmarks.tables import Row, as_id
from mmpo_jax.core.errors import MmpoError

Pair = tuple[float, float]

_REPEATED = re.compile(r" \(row \d+\)$")
"""What our commands write behind an id that an earlier row has."""


def has_rewards(answers: Sequence[Row]) -> bool:
    """Whether the rows are rewards, and no judge's words."""
    return all(row.get("rewards") is not None for row in answers)


def pair_of(row: Row) -> Pair:
    """The two rewards of a row; NaN where there is none.

    Raises:
      MmpoError: there are not two numbers.
    """
    given = row.need("rewards")
    if not isinstance(given, Sequence) or isinstance(given, str) or len(given) != 2:
        raise MmpoError(f"{row.name}: `rewards` are not two numbers but {given!r:.80}")
    try:
        first, second = (math.nan if value is None else float(value) for value in given)
    except (TypeError, ValueError) as error:
        raise MmpoError(f"{row.name}: `rewards` are not two numbers but {given!r:.80}") from error
    return first, second


def rewards_in_order(
    questions: Sequence[Row], answers: Sequence[Row], *keys: str
) -> list[tuple[Row, Pair]]:
    """(question, its rewards): one row of rewards for every question, in the same order.

    Ids may repeat, so the order counts; where rows of rewards have ids, these have to agree.

    Args:
      questions: of the benchmark.
      answers: rows with `rewards`.
      keys: names of a question's id.

    Raises:
      MmpoError: there are more or fewer rows than questions, or an id is another one.
    """
    if len(questions) != len(answers):
        raise MmpoError(
            f"{answers[0].file}: has rewards of {len(answers)} rows, {questions[0].file} has "
            f"{len(questions)}; a row without rewards stands there with `rewards: [null, null]`"
        )
    found = []
    for question, answer in zip(questions, answers, strict=True):
        own, given = as_id(question.need(*keys)), answer.get("id", *keys)
        if given is not None and _REPEATED.sub("", as_id(given)) != own:
            raise MmpoError(f"{answer.name}: has the id {given!r}, the question there has {own!r}")
        found.append((question, pair_of(answer)))
    return found
