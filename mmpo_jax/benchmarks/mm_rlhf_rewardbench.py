"""MM-RLHF-RewardBench: which of two responses is better, Zhang et al. 2025 (arXiv 2502.10391)."""

from __future__ import annotations

import collections
from collections.abc import Sequence
from typing import Any

from mmpo_jax.benchmarks.benchmark import Files, Scores, benchmark, share
from mmpo_jax.benchmarks.rewards import has_rewards, match_rewards
from mmpo_jax.benchmarks.tables import Row
from mmpo_jax.core.errors import MmpoError

CATEGORIES = ("mcq", "long", "short", "safety", "video")
"""Each is part of the path of its rows' images."""


@benchmark(
    source="github.com/yfzhang114/r1_reward, inference/MM-RLHF-Reward/mm_reward_bench.jsonl",
    answers="`rewards: [of chosen, of rejected]` of every row of the benchmark, as `mmpo reward` "
    "writes them or in order; or replies of a judge to pairs as questions",
)
def mm_rlhf_rewardbench(files: Files, answers: Sequence[Row]) -> Scores:
    """Share of pairs whose chosen response has the larger reward (Accuracy), and of questions all
    of whose pairs have (ACC+), of all and of every category. A tie is wrong, and so is a pair
    without rewards.
    """
    if not has_rewards(answers):
        raise MmpoError(f"{answers[0].file}: not all rows have `rewards`")
    matched = match_rewards(files.rows("mm_reward_bench*.jsonl", "*.jsonl"), answers, "id")
    rows: list[dict[str, Any]] = [
        {
            "id": str(question.need("id")),
            "path": _path(question),
            "rewards": rewards,
            "right": rewards is not None and rewards[0] > rewards[1],
        }
        for question, rewards in matched
    ]
    metrics: dict[str, float] = {}
    for category in CATEGORIES:
        of_category = [row for row in rows if _category(row["path"]) == category]
        metrics |= _accuracies(category, of_category)
    metrics |= _accuracies("Overall", rows)
    given = [row["rewards"] for row in rows if row["rewards"] is not None]
    ties, missing = sum(first == second for first, second in given), len(rows) - len(given)
    return Scores(metrics, {"ties": ties, "without_rewards": missing, "pairs": len(rows)}, rows)


def _accuracies(name: str, rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    questions: dict[str, list[bool]] = collections.defaultdict(list)
    for row in rows:
        questions[row["id"]].append(row["right"])
    return {
        f"{name} Accuracy": share(sum(row["right"] for row in rows), len(rows)),
        f"{name} ACC+": share(sum(all(right) for right in questions.values()), len(questions)),
    }


def _path(row: Row) -> str:
    return row.text("image", "video")


def _category(path: str) -> str | None:
    return next((category for category in CATEGORIES if category in path), None)
