"""Multimodal RewardBench: the better of two outputs, Yasunaga et al. 2025 (arXiv 2502.14191)."""

from __future__ import annotations

import collections
import random
from collections.abc import Mapping, Sequence
from typing import Any

from mmpo_jax.benchmarks.benchmark import Files, Scores, benchmark, share
from mmpo_jax.benchmarks.rewards import has_rewards, rewards_in_order
from mmpo_jax.benchmarks.tables import Row
from mmpo_jax.core.errors import MmpoError

COIN_SEED = 123
"""Of the official script."""


@benchmark(
    source="github.com/facebookresearch/multimodal_rewardbench, data/all_data.json",
    answers="the judge's `output` with `Label` and `Meta`, as the official script keeps them, or "
    "`rewards: [of Output1, of Output2]` for every row of all_data.json, in order",
)
def multimodal_rewardbench(
    files: Files, answers: Sequence[Row], *, unparsed_is_wrong: bool = False
) -> Scores:
    """Share of rows where the better output is preferred, of all and of every category; safety and
    reasoning are split in two by the rows' ids.

    Of a judge's words, `[[A]]` anywhere is A, else `[[B]]` is B. Where there is neither, the
    official script tosses a coin of a fixed seed, in the order of the file; with
    `unparsed_is_wrong` such a row is wrong. Equal rewards are wrong.
    """
    rows = _of_rewards(files, answers) if has_rewards(answers) else _of_words(answers)
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
    return Scores(metrics, beside, rows)


def verdict(output: str) -> str | None:
    """The letter of the output that a judge's words prefer; None where they name none."""
    return next((letter for letter in "AB" if f"[[{letter}]]" in output), None)


def _of_words(answers: Sequence[Row]) -> list[dict[str, Any]]:
    found = []
    for answer in answers:
        meta = answer.need("Meta")
        if not isinstance(meta, Mapping) or not isinstance(meta.get("Category"), str):
            raise MmpoError(f"{answer.name}: `Meta` has no `Category`")
        output = answer.text("output")
        found.append(
            {
                "id": answer.text("ID"),
                "category": meta["Category"],
                "label": answer.text("Label"),
                "output": output,
                "read": verdict(output),
            }
        )
    return found


def _of_rewards(files: Files, answers: Sequence[Row]) -> list[dict[str, Any]]:
    matched = rewards_in_order(files.rows("all_data*.json", "*.json"), answers, "ID")
    found = []
    for question, (first, second) in matched:
        preferred = {first > second: "A", second > first: "B"}.get(True)
        found.append(
            {
                "id": question.text("ID"),
                "category": question.text("Category"),
                "label": "B" if question.text("Better") == "Output2" else "A",
                "rewards": [first, second],
                "read": preferred,
            }
        )
    return found


def _category(category: str, name: str) -> str:
    if category == "safety":
        return "safety/bias" if name.lower().startswith("pairs") else "safety/toxicity"
    if category == "reasoning":
        return "reasoning/math" if name.lower().startswith("math") else "reasoning/coding"
    return category
