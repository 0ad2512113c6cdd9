"""Multimodal RewardBench: the better of two outputs, Yasunaga et al. 2025 (arXiv 2502.14191)."""

from __future__ import annotations

import collections
import random
from collections.abc import Mapping, Sequence
from typing import Any

from mmpo_jax.benchmarks.benchmark import Files, Scores, benchmark, share
from mmpo_jax.benchmarks.rewards import has_rewards, match_rewards
from mmpo_jax.benchmarks.tables import Row, said
from mmpo_jax.core.errors import MmpoError

COIN_SEED = 123
"""Of the official script."""


@benchmark(
    source="github.com/facebookresearch/multimodal_rewardbench, data/all_data.json",
    answers="the judge's `output` or `response` for every row of all_data.json, in order, with or "
    "without the `ID`, `Label` and `Meta` that the official script keeps; or `rewards: [of "
    "Output1, of Output2]` of every row, as `mmpo reward` writes them or in order; or replies of a "
    "judge to pairs as questions",
)
def multimodal_rewardbench(
    files: Files, answers: Sequence[Row], *, unparsed_is_wrong: bool = False
) -> Scores:
    """Share of rows where the better output is preferred, of all and of every category; safety and
    reasoning are split in two by the rows' ids.

    Of a judge's words, `[[A]]` anywhere is A, else `[[B]]` is B. Where there is neither, the
    official script tosses a coin of a fixed seed, in the order of the file; with
    `unparsed_is_wrong` such a row is wrong. Equal rewards are wrong, and so is a row without.
    """
    questions = files.rows("all_data*.json", "*.json", "*.jsonl")
    of_rewards = has_rewards(answers)
    rows = (_of_rewards if of_rewards else _of_words)(questions, answers)
    if not unparsed_is_wrong:
        coin = random.Random(COIN_SEED)
        for row in rows:
            if row["read"] is None and "output" in row:
                row["tossed"] = "A" if coin.random() < 0.5 else "B"
    accuracies: dict[str, list[bool]] = collections.defaultdict(list)
    for row in rows:
        row["right"] = row.get("tossed", row["read"]) == row["label"]
        accuracies["all"].append(row["right"])
        accuracies[_category(row["category"], row["id"])].append(row["right"])
    metrics = {f"acc {name}": share(sum(right), len(right)) for name, right in accuracies.items()}
    beside = {
        "unparsed": sum(row["read"] is None for row in rows),
        "tossed": sum("tossed" in row for row in rows),
        "first_is_preferred": share(sum(row["read"] == "A" for row in rows), len(rows)),
        "rows": len(rows),
    }
    if of_rewards:
        beside["without_rewards"] = sum(row["rewards"] is None for row in rows)
    return Scores(metrics, beside, rows)


def verdict(output: str) -> str | None:
    """The letter of the output that a judge's words prefer; None where they name none."""
    return next((letter for letter in "AB" if f"[[{letter}]]" in output), None)


def _of_words(questions: Sequence[Row], answers: Sequence[Row]) -> list[dict[str, Any]]:
    """What the judge says of every row; what the answers repeat of a row has to be the same.

    Raises:
      MmpoError: there are more or fewer answers than rows, or one is of another row.
    """
    if len(questions) != len(answers):
        raise MmpoError(
            f"{answers[0].file}: has {len(answers)} answers, {questions[0].file} has "
            f"{len(questions)} rows"
        )
    found = []
    for question, answer in zip(questions, answers, strict=True):
        row = _row(question)
        meta = answer.get("Meta")
        repeated = {
            "id": answer.get("ID", "id"),
            "label": answer.get("Label"),
            "category": meta.get("Category") if isinstance(meta, Mapping) else None,
        }
        for name, value in repeated.items():
            if value is not None and value != row[name]:
                raise MmpoError(
                    f"{answer.name}: has the {name} {value!r}, {question.name} has {row[name]!r}"
                )
        output = said(answer, "output", "response")
        found.append({**row, "output": output, "read": verdict(output)})
    return found


def _of_rewards(questions: Sequence[Row], answers: Sequence[Row]) -> list[dict[str, Any]]:
    found = []
    for question, pair in match_rewards(questions, answers, "ID"):
        preferred = None
        if pair is not None:
            first, second = pair
            preferred = {first > second: "A", second > first: "B"}.get(True)
        found.append({**_row(question), "rewards": pair, "read": preferred})
    return found


def _row(question: Row) -> dict[str, Any]:
    return {
        "id": question.text("ID"),
        "category": question.text("Category"),
        "label": "B" if question.text("Better") == "Output2" else "A",
    }


def _category(category: str, name: str) -> str:
    if category == "safety":
        return "safety/bias" if name.lower().startswith("pairs") else "safety/toxicity"
    if category == "reasoning":
        return "reasoning/math" if name.lower().startswith("math") else "reasoning/coding"
    return category
