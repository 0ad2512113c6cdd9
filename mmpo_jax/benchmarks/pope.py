"""POPE: yes/no questions about objects, Li et al. 2023 (arXiv 2305.10355)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

from etils import epath

from mmpo_jax.benchmarks.benchmark import Asked, Files, Metric, Scores, benchmark, share
from mmpo_jax.benchmarks.tables import (
    Row,
    as_id,
    have_ids,
    match_by_id,
    match_by_order,
    read_table,
    said,
)
from mmpo_jax.core.errors import MmpoError
from mmpo_jax.core.sections import PositiveInt
from mmpo_jax.data.records import Record, Turn

Reading = Literal["official", "whole_word"]

PATTERNS = ("*_pope_*.json", "*.json", "*.jsonl")
METRICS = (
    Metric("Accuracy", "more", guards="accuracy", curve=True),
    Metric("Precision", "more"),
    Metric("Recall", "more", guards="recall"),
    Metric("F1 score", "more", curve=True),
    Metric("Yes ratio"),
)


def questions(files: Files, *, suffix: str = "", max_new_tokens: PositiveInt = 16) -> list[Asked]:
    """The questions of one file, answered greedily.

    LLaVA asks with `suffix` "\\nAnswer the question using a single word or phrase.", the official
    repository without any.
    """
    paths = files.find(*PATTERNS)
    if len(paths) > 1:
        raise MmpoError(f"{files.root}: has several question files; name one, as {paths[0]}")
    records = [
        Record(
            id=as_id(row.need("question_id", "image_id")),
            images=(files.image(row, "image", "image_name"),),
            prompt=(Turn("user", row.text("text", "query") + suffix),),
            responses=(),
        )
        for row in read_table(paths[0])
    ]
    return [Asked(records, max_new_tokens)]


@benchmark(
    source="github.com/AoiDragon/POPE, output/coco/coco_pope_{random,popular,adversarial}.json",
    answers="`answer` or `response`, in the order of the questions or with their `question_id`",
    metrics=METRICS,
    asks=questions,
    images="COCO val2014 (cocodataset.org)",
)
def pope(files: Files, answers: Sequence[Row], *, reading: Reading = "official") -> Scores:
    """Accuracy, precision, recall and F1 of yes/no answers; yes is positive.

    The official script reads an answer as no if one of `No`, `no`, `not` is a word of what stands
    before its first full stop, and as yes otherwise: `NO`, `None` and `isn't` are a yes. With
    `whole_word` it is the first word that is yes or no, in any case; an answer without either is
    wrong and counted.
    """
    questions = _asked(files, answers)
    matched = _matched(questions, answers)
    read = official if reading == "official" else whole_word
    rows = [
        _row(question, said(answer, "answer", "response", "text"), read)
        for question, answer in matched
    ]
    right = [row["read"] == row["label"] for row in rows]
    positive = [row["read"] == "yes" for row in rows]
    true_positives = sum(yes and correct for yes, correct in zip(positive, right, strict=True))
    precision = share(true_positives, sum(positive))
    recall = share(true_positives, sum(row["label"] == "yes" for row in rows))
    metrics = {
        "Accuracy": share(sum(right), len(rows)),
        "Precision": precision,
        "Recall": recall,
        "F1 score": f1(precision, recall),
        "Yes ratio": share(sum(positive), len(rows)),
    }
    beside = {
        "no_ratio": share(sum(row["read"] == "no" for row in rows), len(rows)),
        "neither_yes_nor_no": sum(whole_word(row["answer"]) is None for row in rows),
        "read_otherwise_by_whole_word": sum(
            official(row["answer"]) != whole_word(row["answer"]) for row in rows
        ),
        "answers": len(rows),
        "questions": len(questions),
    }
    return Scores(metrics, beside, rows)


def _row(question: Row, answer: str, read: Callable[[str], str | None]) -> dict[str, Any]:
    label, said_yes = question.text("label").strip().lower(), read(answer) == "yes"
    true_positive = said_yes and label == "yes"
    return {
        "id": as_id(question.need("question_id", "image_id")),
        "label": label,
        "answer": answer,
        "read": read(answer),
        "scores": {
            "Accuracy": int(read(answer) == label),
            "Precision": [int(true_positive), int(said_yes)],
            "Recall": [int(true_positive), int(label == "yes")],
            "F1 score": [2 * true_positive, said_yes + (label == "yes")],
            "Yes ratio": int(said_yes),
        },
    }


def official(answer: str) -> str:
    """What POPE's `evaluate.py` reads in an answer."""
    words = answer.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def whole_word(answer: str) -> str | None:
    """The first word of an answer that is yes or no; None without one."""
    words = "".join(c if c.isalpha() else " " for c in answer.lower()).split()
    return next((word for word in words if word in ("yes", "no")), None)


def f1(precision: float, recall: float) -> float:
    """The harmonic mean of precision and recall; NaN where it is undefined."""
    if math.isnan(precision) or math.isnan(recall):
        return math.nan
    return share(2 * precision * recall, precision + recall)


def _asked(files: Files, answers: Sequence[Row]) -> list[Row]:
    """The questions of the file that the answers are of, which have the same numbers in all.

    Raises:
      MmpoError: no file fits, or several do.
    """
    paths = files.find(*PATTERNS)
    tables = [(path, read_table(path)) for path in paths]
    if len(tables) == 1:
        return tables[0][1]
    if all(answer.get("question") is not None for answer in answers):
        tables = [(path, table) for path, table in tables if _same_texts(table, answers)]
    if len(tables) > 1:
        of_name = epath.Path(answers[0].file).stem
        named = [(path, rows) for path, rows in tables if path.stem.split("_")[-1] in of_name]
        tables = named or tables
    if len(tables) == 1:
        return tables[0][1]
    raise MmpoError(
        f"{answers[0].file}: {'more than one' if tables else 'none'} of the question files in "
        f"{files.root} fits the answers: name one, as --data {paths[0]}"
    )


def _same_texts(questions: Sequence[Row], answers: Sequence[Row]) -> bool:
    """Whether answers repeat the questions that they are matched with."""
    try:
        _matched(questions, answers)
    except MmpoError:
        return False
    return True


def _matched(questions: Sequence[Row], answers: Sequence[Row]) -> list[tuple[Row, Row]]:
    if have_ids(answers, "question_id"):
        matched = match_by_id(questions, answers, "question_id", "image_id")
    else:
        matched = match_by_order(questions, answers)
    for question, answer in matched:
        asked, repeated = question.text("text", "query"), answer.get("question")
        if isinstance(repeated, str) and not repeated.startswith(asked):
            raise MmpoError(
                f"{answer.name}: answers {repeated!r:.80}, and {question.name} asks {asked!r:.80}"
            )
    return matched
