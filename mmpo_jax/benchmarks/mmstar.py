"""MMStar: multiple choice that needs the picture, Chen et al. 2024 (arXiv 2403.20330)."""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from mmpo_jax.benchmarks.benchmark import Asked, Files, Metric, Scores, benchmark, share
from mmpo_jax.benchmarks.tables import Row, as_id, match_by_id, said
from mmpo_jax.core.sections import PositiveInt
from mmpo_jax.data.records import Record, Turn

Average = Literal["official", "lmms_eval"]
_BEGINNINGS = ("", "(", "option ", "the answer is ")
"""What may stand before the letter."""

FILES = ("*.parquet", "*.jsonl", "*.xlsx", "*.tsv")
METRICS = (
    Metric("final score", "more", guards="accuracy", curve=True),
    Metric("share unreadable", "less", guards="reading"),
)


def questions(
    files: Files,
    *,
    suffix: str = "\nAnswer with the option's letter from the given choices directly",
    max_new_tokens: PositiveInt = 16,
) -> list[Asked]:
    """The questions, answered greedily; `suffix` is that of lmms-eval, as the letter has to begin
    the answer."""
    records = [
        Record(
            id=as_id(row.need("index")),
            images=(files.image(row, "image"),),
            prompt=(Turn("user", row.text("question") + suffix),),
            responses=(),
        )
        for row in files.rows(*FILES)
    ]
    return [Asked(records, max_new_tokens)]


@benchmark(
    source="huggingface.co/datasets/Lin-Chen/MMStar, mmstar.parquet",
    answers="`prediction` or `response` with the question's `index` or `id`",
    metrics=METRICS,
    asks=questions,
)
def mmstar(files: Files, answers: Sequence[Row], *, average: Average = "official") -> Scores:
    """Share of right choices, of all and of every capability.

    An answer is right if the letter begins it, perhaps behind "(", "option " or "the answer is ",
    in any case; a question without an answer is wrong. The official score is that of all questions;
    `lmms_eval` takes the means of sub-skills, each of the same weight, for capabilities and for
    all.
    """
    asked = answers if _complete(answers) else files.rows(*FILES)
    answered = {
        question.number: _judged(question, said(answer, "prediction", "response"))
        for question, answer in match_by_id(asked, answers, "index")
    }
    judged = [answered.get(question.number) or _judged(question, "") for question in asked]
    sizes = collections.Counter(_skill(row) for row in judged)
    rows = [_with_scores(row, sizes, average) for row in judged]
    capabilities: dict[str, list[bool]] = collections.defaultdict(list)
    skills: dict[str, list[bool]] = collections.defaultdict(list)
    for row in rows:
        capabilities[row["category"]].append(row["right"])
        skills[_skill(row)].append(row["right"])
    shares = {name: share(sum(right), len(right)) for name, right in skills.items()}
    if average == "official":
        metrics = {name: share(sum(right), len(right)) for name, right in capabilities.items()}
        final = share(sum(row["right"] for row in rows), len(rows))
    else:
        metrics = {
            name: _mean(
                [value for skill, value in shares.items() if skill.startswith(f"{name} / ")]
            )
            for name in capabilities
        }
        final = _mean(list(shares.values()))
    beside = {
        "correct": sum(row["right"] for row in rows),
        "unreadable": sum(row["read"] is None for row in rows),
        "share unreadable": share(sum(row["read"] is None for row in rows), len(rows)),
        "answers": len(answered),
        "questions": len(asked),
    }
    return Scores({"final score": final, **metrics, **shares}, beside, rows)


def choice(answer: str) -> str | None:
    """The letter that an answer chooses by the official rule, in lower case; None without one."""
    text = answer.strip().lower()
    for beginning in _BEGINNINGS:
        letter = text[len(beginning) : len(beginning) + 1]
        if text.startswith(beginning) and letter in ("a", "b", "c", "d"):
            return letter
    return None


def _complete(answers: Sequence[Row]) -> bool:
    """Whether answers come with their questions, as the official files of predictions do."""
    return all(row.get("answer") is not None and row.get("l2_category") for row in answers)


def _judged(question: Row, answer: str) -> dict[str, Any]:
    letter = str(question.need("answer")).strip().lower()
    return {
        "id": str(question.need("index")),
        "category": question.text("category"),
        "l2_category": question.text("l2_category"),
        "label": letter,
        "answer": answer,
        "read": choice(answer),
        "right": choice(answer) == letter,
    }


def _skill(row: Mapping[str, Any]) -> str:
    return f"{row['category']} / {row['l2_category']}"


def _with_scores(row: dict[str, Any], sizes: Mapping[str, int], average: Average) -> dict[str, Any]:
    """A row with what it adds: where sub-skills weigh alike, more the fewer there are of its own.

    Args:
      row: of `_judged`.
      sizes: how many rows each sub-skill has.
      average: which score.
    """
    weight = 1.0
    if average == "lmms_eval":
        weight = sum(sizes.values()) / (len(sizes) * sizes[_skill(row)])
    scores = {"final score": weight * row["right"], "share unreadable": int(row["read"] is None)}
    return {**row, "scores": scores}


def _mean(values: Sequence[float]) -> float:
    return share(sum(values), len(values))
