"""LLaVA-Bench, of COCO and in the wild: answers beside GPT-4's, Liu et al. 2023 (arXiv 2304.08485).

The judge's rules are data: `rule.json` has one for each category of questions.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from mmpo_jax.benchmarks.benchmark import Asked, Files, Metric, Scores, benchmark, mean_words, share
from mmpo_jax.benchmarks.judging import Judge, JudgePrompt, Question, review_of
from mmpo_jax.benchmarks.scripts import official_name
from mmpo_jax.benchmarks.tables import Row, as_id, have_ids, match_by_id, match_by_order, said
from mmpo_jax.core.errors import DataError, MmpoError
from mmpo_jax.core.files import read_bytes
from mmpo_jax.core.sections import PositiveInt
from mmpo_jax.data.records import Record, Turn

Summary = Literal["llava", "rlhf_v"]
Pair = tuple[float, float]
"""Scores of the reference and of the model, from 1 to 10."""

QUESTIONS = ("qa90_questions.jsonl", "questions.jsonl")
REFERENCES = ("qa90_gpt4_answer.jsonl", "answers_gpt4.jsonl")
CONTEXTS = ("caps_boxes_coco2014_val_80.jsonl", "context.jsonl")
RULES = ("rule.json", "rule.jsonfile")
WILD = "llava_bench_"
"""What categories of the questions in the wild have in front in `rule.json` and in reviews."""
UNREAD: Pair = (-1.0, -1.0)
"""Scores of a review that the official rule cannot read."""

JUDGE = JudgePrompt(
    "llava_bench-1",
    official="gpt-4-0314",
    max_new_tokens=1024,
    temperature=0.2,
    system="You are a helpful and precise assistant for checking the quality of the answer.",
    order="the reference first, the model second",
)
METRICS = (
    Metric("all", "more", ".1f", curve=True),
    Metric("share unparsed", "less", guards="reading"),
    Metric("words", form=".1f", guards="length"),
)


def questions(files: Files, *, max_new_tokens: PositiveInt = 1024) -> list[Asked]:
    """The questions, answered greedily, as LLaVA does."""
    records = [
        Record(
            id=as_id(row.need("question_id")),
            images=(files.image(row, "image"),),
            prompt=(Turn("user", row.text("text")),),
            responses=(),
        )
        for row in files.rows(*QUESTIONS)
    ]
    return [Asked(records, max_new_tokens)]


@benchmark(
    source="github.com/haotian-liu/LLaVA, playground/data/coco2014_val_qa_eval and "
    "llava/eval/table (COCO), or huggingface.co/datasets/liuhaotian/llava-bench-in-the-wild",
    answers="`text` or `response` with the question's `question_id` or `id`, or in their order",
    judgements="reviews as the official script keeps them: `tuple` with `category`, or `content`",
    metrics=METRICS,
    asks=questions,
    images="COCO val2014 (cocodataset.org), or LLaVA-Bench in the wild",
)
def llava_bench(
    files: Files, answers: Sequence[Row], judge: Judge, *, summary: Summary = "llava"
) -> Scores:
    """The model's mean score in percent of the reference's, of all questions (all) and of every
    category, with both means.

    A review's scores are the two numbers that make up its first line, commas read as blanks, with
    exactly one blank between them; otherwise both are -1. LLaVA's summary takes these into the
    means, that of RLHF-V (`rlhf_v`) leaves them out. Both round the means to three digits before
    they divide.
    """
    rows = _published(files, judge, answers) or _judged(files, answers, judge)
    kept = _counted(rows, summary)
    metrics: dict[str, float] = {}
    for name, pairs in _by_category(kept, summary).items():
        metrics |= _means(name, pairs, summary)
    other: Summary = "rlhf_v" if summary == "llava" else "llava"
    for row in rows:
        row["scores"] = _scores(row, counts=row in kept)
    unread = sum(row["tuple"] == UNREAD for row in rows)
    beside = {
        "unparsed": unread,
        "share unparsed": share(unread, len(rows)),
        "without_judgement": sum(row["tuple"] is None for row in rows),
        f"all by {other}": _means("all", [row["tuple"] for row in _counted(rows, other)], other)[
            "all"
        ],
        "model_is_better": share(sum(row["tuple"][1] > row["tuple"][0] for row in kept), len(kept)),
        "words": mean_words(row["answer"] for row in rows),
        "reviews": sum(row["tuple"] is not None for row in rows),
    }
    if any(row["reference"] is not None for row in rows):  # published reviews have none
        beside["words_of_reference"] = mean_words(row["reference"] for row in rows)
    return Scores(metrics or {"all": math.nan}, beside, rows)


def read_scores(review: str) -> Pair:
    """The scores in a review by the official rule; `UNREAD` where it finds none."""
    words = review.split("\n")[0].replace(",", " ").split(" ")
    if len(words) != 2:
        return UNREAD
    try:
        return float(words[0]), float(words[1])
    except ValueError:
        return UNREAD


def _counted(rows: Sequence[dict[str, Any]], summary: Summary) -> list[dict[str, Any]]:
    """The rows whose scores a summary takes."""
    judged = [row for row in rows if row["tuple"] is not None]
    return [row for row in judged if summary == "llava" or row["tuple"][0] != -1]


def _by_category(rows: Sequence[dict[str, Any]], summary: Summary) -> dict[str, list[Pair]]:
    """Scores of all rows and of every category, in the order of the summary."""
    found: dict[str, list[Pair]] = {}
    for row in rows:
        for name in (row["category"], "all"):
            found.setdefault(name, []).append(row["tuple"])
    return dict(sorted(found.items())) if summary == "llava" else found


def _means(name: str, pairs: Sequence[Pair], summary: Summary) -> dict[str, float]:
    """The relative score, and the means as the summary prints them: times 10 by LLaVA's."""
    if not pairs:
        return {name: math.nan}
    reference, model = (round(value, 3) for value in np.asarray(pairs).mean(0).tolist())
    relative = round(share(model, reference) * 100, 1)
    if summary == "llava":
        reference, model = round(reference * 10, 1), round(model * 10, 1)
    return {name: relative, f"{name}: reference": reference, f"{name}: model": model}


def _scores(row: Mapping[str, Any], counts: bool) -> dict[str, Any]:
    """What an answer adds to each metric."""
    reference, model = row["tuple"] if counts else (0.0, 0.0)
    answer = row["answer"]
    return {
        "all": [100 * model, reference],
        "share unparsed": int(row["tuple"] == UNREAD),
        "words": [0, 0] if answer is None else [len(answer.split()), 1],
    }


def _published(files: Files, judge: Judge, answers: Sequence[Row]) -> list[dict[str, Any]] | None:
    """Reviews in the layout of the official scripts; None where there are none.

    Raises:
      MmpoError: a review has no scores, or no category and is of no question.
    """
    reviews = judge.published
    if reviews is None and all("tuple" in row.values for row in answers):
        reviews = list(answers)
    if reviews is None:
        return None
    judge.tell(JUDGE, [row.get("model") for row in reviews])
    texts = {
        as_id(row.get("question_id", "id")): said(row, "text", "response")
        for row in answers
        if "text" in row.values or "response" in row.values
    }
    categories: dict[str, str] = {}
    if any(row.get("category") is None for row in reviews):
        contexts = _contexts(files)
        for question in files.rows(*QUESTIONS):
            categories[as_id(question.need("question_id"))] = _seen(question, contexts)[1]
    found = []
    for row in reviews:
        name = as_id(row.need("question_id", "id"))
        category: Any = row.get("category")
        if category is None and name not in categories:
            raise MmpoError(f"{row.name}: has no `category`, and there is no question {name!r}")
        found.append(
            {
                "id": name,
                "category": categories[name] if category is None else str(category),
                "answer": texts.get(name),
                "reference": None,
                "review": row.get("content", "review"),
                "tuple": _pair(row),
            }
        )
    reviewed = {row["id"] for row in found}
    unjudged = {"category": None, "reference": None, "review": None, "tuple": None}
    return found + [
        {"id": name, "answer": text, **unjudged}
        for name, text in texts.items()
        if name not in reviewed
    ]


def _pair(row: Row) -> Pair | None:
    """The scores that a review's row has, or those in its text; None where that is null.

    Raises:
      MmpoError: it has neither.
    """
    given = row.get("tuple", "score")
    if given is None:
        review = review_of(row)
        return None if review is None else read_scores(review)
    try:
        reference, model = given
        return float(reference), float(model)
    except (TypeError, ValueError) as error:
        raise MmpoError(f"{row.name}: its scores are not two numbers: {given!r:.80}") from error


def _judged(files: Files, answers: Sequence[Row], judge: Judge) -> list[dict[str, Any]]:
    """The reviews of a judge that is asked, or was."""
    asked = files.rows(*QUESTIONS)
    if have_ids(answers, "question_id"):
        matched = match_by_id(asked, answers, "question_id")
    else:
        matched = match_by_order(asked, answers)
    references = {
        as_id(row.need("question_id")): row.text("text") for row in files.rows(*REFERENCES)
    }
    contexts = _contexts(files)
    rules = _rules(files)
    rows: list[dict[str, Any]] = []
    to_ask = []
    for question, answer in matched:
        name = as_id(question.need("question_id"))
        if name not in references:
            raise MmpoError(f"{question.name}: there is no reference answer to question {name}")
        context, category = _seen(question, contexts)
        if category not in rules:
            raise MmpoError(f"{question.name}: there is no rule for {category!r}")
        row: dict[str, Any] = {
            "id": name,
            "category": category,
            "answer": said(answer, "text", "response"),
            "reference": references[name],
        }
        rows.append(row)
        told = _told(
            context, question.text("text"), row["reference"], row["answer"], rules[category]
        )
        to_ask.append(Question(name, told))
    used = [rule["prompt"] for _, rule in sorted(rules.items())]
    prompt = dataclasses.replace(JUDGE, name=official_name("llava_bench", *used))
    judgements = judge.ask(prompt, to_ask, lambda review: read_scores(review) != UNREAD)
    for row, judgement in zip(rows, judgements, strict=True):
        row["review"] = judgement.text
        row["tuple"] = None if judgement.text is None else read_scores(judgement.text)
    return rows


def _rules(files: Files) -> dict[str, dict[str, str]]:
    """Category -> `role` of the answers' authors and `prompt` of the judge."""
    path = files.find(*RULES)[0]
    try:
        rules = json.loads(read_bytes(path))
        return {
            name: {key: rule[key] for key in ("role", "prompt")} for name, rule in rules.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: has no rules with `role` and `prompt`: {error}") from error


def _contexts(files: Files) -> dict[str, Row]:
    """Name of an image -> what is known of it."""
    return {row.text("image"): row for row in files.rows(*CONTEXTS)}


def _seen(question: Row, contexts: Mapping[str, Row]) -> tuple[str, str]:
    """(what the judge knows of a question's image, the question's category).

    Raises:
      MmpoError: nothing is known of the image.
    """
    image, category = question.text("image"), question.text("category")
    if image not in contexts:
        raise MmpoError(f"{question.name}: there is no context of {image}")
    row = contexts[image]
    if "captions" not in row.values:
        caption = row.need("caption")
        return (caption if isinstance(caption, str) else "\n".join(caption)), WILD + category
    boxes = [f"{one['category']}: {one['bbox']}" for one in row.need("instances")]
    return "\n".join(row.need("captions")) + "\n\n" + "\n".join(boxes), category


def _told(context: str, asked: str, reference: str, answer: str, rule: Mapping[str, str]) -> str:
    """What the judge is told, in the sections and the order of the official script."""
    role = rule["role"]
    sections = [("Context", context), ("Question", asked)]
    for place, text in enumerate((reference, answer), 1):
        sections.append((f"{role} {place}", f"{text}\n\n[End of {role} {place}]"))
    sections.append(("System", rule["prompt"]))
    return "".join(f"[{name}]\n{text}\n\n" for name, text in sections)
