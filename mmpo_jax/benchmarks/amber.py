"""AMBER: what descriptions invent, and yes/no questions, Wang et al. 2023 (arXiv 2311.07397)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from etils import epath

from mmpo_jax.benchmarks.amber_descriptions import Descriptions
from mmpo_jax.benchmarks.benchmark import Asked, Files, Metric, Scores, benchmark, share
from mmpo_jax.benchmarks.english import Tokenizer
from mmpo_jax.benchmarks.pope import whole_word
from mmpo_jax.benchmarks.similar_words import SOURCE, amber_folder, read_text
from mmpo_jax.benchmarks.tables import Row, as_id, read_table, said
from mmpo_jax.core.errors import MmpoError
from mmpo_jax.core.progress import counted
from mmpo_jax.core.sections import PositiveInt
from mmpo_jax.data.records import Record, Turn

METRICS = (
    Metric("CHAIR", "less", ".1f", curve=True),
    Metric("Cover", "more", ".1f", guards="recall"),
    Metric("Hal", "less", ".1f", curve=True),
    Metric("Cog", "less", ".1f"),
    Metric("Accuracy", "more", ".1f", guards="accuracy"),
    Metric("F1", "more", ".1f", curve=True),
    Metric("words_per_description", None, ".1f", guards="length", heading="words"),
    Metric("no_ratio", heading="no"),
    Metric("neither_ratio", "less", guards="reading", heading="neither"),
)

EvaluationType = Literal["a", "g", "d", "de", "da", "dr"]
"""All, generative, discriminative, and of these existence, attribute and relation."""
Reading = Literal["official", "whole_word"]

DESCRIPTIONS = 1004
"""Ids up to it are descriptions, the others yes/no questions."""

QUERIES: dict[EvaluationType, str] = {
    "a": "all",
    "g": "generative",
    "d": "discriminative",
    "de": "discriminative-existence",
    "da": "discriminative-attribute",
    "dr": "discriminative-relation",
}
"""What the files of queries are called."""

KINDS = {
    "discriminative-attribute-state": "as_",
    "discriminative-attribute-number": "an_",
    "discriminative-attribute-action": "aa_",
    "discriminative-hallucination": "ha_",
    "discriminative-relation": "asso_",
    "relation": "asso_",
}
"""Types of questions -> what the names of their sums in `metrics.txt` begin with."""

SUMS = ("qa_correct", "qa_no", "qa_ans_no")
"""Right answers; questions whose answer is no; answers that are no."""


@dataclasses.dataclass(frozen=True)
class Block:
    """Accuracy, precision, recall and F1 of some kinds of questions."""

    name: str
    kinds: tuple[str, ...]
    printed: tuple[str, ...]
    """Evaluation types by which the script prints it."""
    epsilon: float = 0.0001
    """In F1's denominator."""


BLOCKS = (
    Block("", ("",), ("a", "d")),
    Block("Existence ", ("ha_",), ("a", "d", "de"), 0.001),
    Block("Attribute ", ("as_", "an_", "aa_"), ("a", "d", "da")),
    Block("State ", ("as_",), ("a", "d", "da")),
    Block("Number ", ("an_",), ("a", "d", "da")),
    Block("Action ", ("aa_",), ("a", "d", "da")),
    Block("Relation ", ("asso_",), ("a", "d", "dr")),
)


def questions(
    files: Files,
    *,
    queries: EvaluationType = "a",
    suffix: str = "",
    max_new_tokens: PositiveInt = 512,
) -> list[Asked]:
    """The queries of all dimensions or of one, answered greedily; nothing official says how.

    `suffix` goes behind the yes/no questions, as " Answer with Yes or No." may, and their answers
    have at most 16 tokens.
    """
    folder = amber_folder(files.folder)
    path = folder / "query" / f"query_{QUERIES[queries]}.json"
    described: list[Record] = []
    asked: list[Record] = []
    for row in read_table(path):
        place = int(row.need("id"))
        into, end = (described, "") if place <= DESCRIPTIONS else (asked, suffix)
        turn = Turn("user", row.text("query") + end)
        into.append(Record(str(place), (files.image(row, "image"),), (turn,), ()))
    if described:  # asking a model may take hours before scores need these
        Descriptions.read(folder).english.check()
    ways = [
        Asked(described, max_new_tokens, name="descriptions"),
        Asked(asked, min(16, max_new_tokens), name="questions"),
    ]
    return [way for way in ways if way.records]


@benchmark(
    source=SOURCE,
    answers="`id` of the query and `response`: a description (1 to 1004) or Yes or No; all or some",
    metrics=METRICS,
    asks=questions,
    images="AMBER (its README has the link)",
)
def amber(
    files: Files,
    answers: Sequence[Row],
    *,
    evaluation_type: EvaluationType = "a",
    reading: Reading = "official",
    tokenizer: Tokenizer = "nltk_3.8",
) -> Scores:
    """What descriptions invent (CHAIR, Hal, Cog) and mention (Cover), and accuracy, precision,
    recall and F1 of yes/no questions, in percent; "no" is positive.

    As in the official script, every denominator begins at 0.001 (`metrics.txt`), F1 is that of
    rounded precision and recall, and only `Yes` and `No`, written so, are answers; with
    `whole_word` it is the first word that is yes or no, in any case. `evaluation_type` says which
    numbers there are: a all, g of descriptions, d of questions, de, da and dr of one dimension.
    Words are divided as by nltk 3.8, of AMBER's time, or as by the installed one.
    """
    folder = amber_folder(files.folder)
    questions = read_table(folder / "annotations.json")
    asked = [
        (_question(questions, answer), said(answer, "response", "answer")) for answer in answers
    ]
    sums = _first_sums(folder)
    kinds = {question.text("type") for question, _ in asked}
    descriptions = Descriptions.read(folder, tokenizer) if "generative" in kinds else None
    rows: list[dict[str, Any]] = []
    for question, text in counted(asked, "scoring AMBER's answers"):
        if descriptions is not None and question.text("type") == "generative":
            row = descriptions.score(question, text, sums)
        else:
            row = _answered(question, text, reading, sums)
        rows.append({"id": question.number, "type": question.text("type"), **row})
        rows[-1]["scores"] = _added(rows[-1], question)
    made_with = {} if descriptions is None else descriptions.made_with()
    metrics = _metrics(sums, evaluation_type)
    generative = [row for row in rows if row["type"] == "generative"]
    if evaluation_type == "a":
        both = 0 < len(generative) < len(rows)
        score = (100 - metrics["CHAIR"] + metrics["F1"]) / 2 if both else math.nan
        metrics["AMBER Score"] = score
    return Scores(metrics, _beside(rows, questions), rows, made_with)


def _first_sums(folder: epath.Path) -> dict[str, float]:
    """What the sums of `metrics.txt` begin with."""
    path = folder / "metrics.txt"
    sums: dict[str, float] = {}
    for number, line in enumerate(read_text(path).splitlines(), 1):
        name, equals, value = line.partition("=")
        try:
            if equals:
                sums[name.strip()] = float(value)
        except ValueError as error:
            raise MmpoError(f"{path}, line {number}: {value!r} is no number") from error
    kinds = ["", *dict.fromkeys(KINDS.values())]
    parts = ("chair", "safe_cover", "hallu_cover", "non_hallu")
    names = [*parts, *(f"{kind}{part}" for kind in kinds for part in SUMS)]
    missing = {f"{name}_{end}" for name in names for end in ("score", "num")} - sums.keys()
    if missing:
        raise MmpoError(f"{path}: has no {', '.join(sorted(missing))}")
    return sums


def _question(questions: Sequence[Row], answer: Row) -> Row:
    """The annotation of an answer, which is that of the id's number."""
    named = answer.need("id")
    try:
        place = int(as_id(named).rsplit("/", 1)[-1])
    except (TypeError, ValueError) as error:
        raise MmpoError(f"{answer.name}: the id is {named!r:.80} and no number") from error
    if not 1 <= place <= len(questions):
        raise MmpoError(f"{answer.name}: the id is {place}, not one of 1 to {len(questions)}")
    question = questions[place - 1]
    if question.get("id") not in (None, place):
        raise MmpoError(f"{question.name}: has the id {question.get('id')}, ids count from 1")
    return question


def _answered(question: Row, text: str, reading: Reading, sums: dict[str, float]) -> dict[str, Any]:
    """What an answer says; adds it to the sums of all and of its kind."""
    truth = question.text("truth")
    read = _read(text, reading)
    no, right = read == "no", read == truth
    for kind in ("", KINDS.get(question.text("type"), "asso_")):
        sums[f"{kind}qa_correct_num"] += 1
        sums[f"{kind}qa_correct_score"] += right
        if truth == "no":
            sums[f"{kind}qa_no_num"] += 1
            sums[f"{kind}qa_no_score"] += no
        if no:
            sums[f"{kind}qa_ans_no_num"] += 1
            sums[f"{kind}qa_ans_no_score"] += truth == "no"
    return {"truth": truth, "answer": text, "read": read, "right": right}


def _read(text: str, reading: Reading) -> str | None:
    if reading == "official":
        return text.lower() if text in ("Yes", "No") else None
    return whole_word(text)


def _metrics(sums: Mapping[str, float], evaluation_type: EvaluationType) -> dict[str, float]:
    """The numbers that the script prints, rounded as it rounds them."""

    def percent(*names: str) -> float:
        score = sum(sums[f"{name}_score"] for name in names)
        return score / sum(sums[f"{name}_num"] for name in names) * 100

    metrics: dict[str, float] = {}
    if evaluation_type in ("a", "g"):
        metrics["CHAIR"] = round(percent("chair"), 1)
        metrics["Cover"] = round(percent("safe_cover"), 1)
        metrics["Hal"] = round(100 - percent("non_hallu"), 1)
        metrics["Cog"] = round(percent("hallu_cover"), 1)
    for block in BLOCKS:
        if evaluation_type not in block.printed:
            continue
        accuracy, recall, precision = (
            round(percent(*(kind + part for kind in block.kinds)), 1) for part in SUMS
        )
        p, r = precision / 100, recall / 100
        metrics[f"{block.name}Accuracy"] = accuracy
        metrics[f"{block.name}Precision"] = precision
        metrics[f"{block.name}Recall"] = recall
        metrics[f"{block.name}F1"] = round(2 * p * r / (p + r + block.epsilon) * 100, 1)
    return metrics


def _added(row: Mapping[str, Any], question: Row) -> dict[str, list[float]]:
    """What a row adds to the metrics that runs compare, but for what every sum begins with."""
    added: dict[str, list[float]] = {metric.name: [0, 0] for metric in METRICS}
    if row["type"] == "generative":
        unsafe, nouns = len(row["unsafe"]), len(row["nouns"])
        added["CHAIR"] = [100 * unsafe, nouns]
        added["Hal"] = [100 * bool(unsafe), 1]
        added["Cover"] = [100 * len(row["covered"]), len(question.need("truth"))]
        added["Cog"] = [100 * len(row["hit"]), len(question.need("hallu"))]
        added["words_per_description"] = [row["words"], 1]
    else:
        no, truly = row["read"] == "no", row["truth"] == "no"
        added["Accuracy"] = [100 * row["right"], 1]
        added["F1"] = [200 * (no and truly), no + truly]
        added["no_ratio"] = [no, 1]
        added["neither_ratio"] = [row["read"] is None, 1]
    return added


def _beside(rows: Sequence[Mapping[str, Any]], questions: Sequence[Row]) -> dict[str, float]:
    described = [row for row in rows if row["type"] == "generative"]
    asked = [row for row in rows if row["type"] != "generative"]
    beside: dict[str, float] = {
        "descriptions": len(described),
        "answers": len(asked),
        "questions_without_an_answer": len(questions) - len({row["id"] for row in rows}),
    }
    if described:
        beside |= {
            "words_per_description": share(sum(row["words"] for row in described), len(described)),
            "nouns_per_description": share(
                sum(len(row["nouns"]) for row in described), len(described)
            ),
            "descriptions_without_nouns": sum(not row["nouns"] for row in described),
            "nouns_lost_to_capitals": sum(row["nouns_lost_to_capitals"] for row in described),
        }
    if asked:
        by_words = [whole_word(row["answer"]) for row in asked]
        beside |= {
            "no_ratio": share(sum(row["read"] == "no" for row in asked), len(asked)),
            "neither_ratio": share(sum(row["read"] is None for row in asked), len(asked)),
            "read_otherwise_by_whole_word": sum(
                _read(row["answer"], "official") != word
                for row, word in zip(asked, by_words, strict=True)
            ),
        }
    return beside
