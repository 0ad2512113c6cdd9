"""VL-RewardBench: which of two responses is better, Li et al. 2024 (arXiv 2411.17451)."""

from __future__ import annotations

import collections
import dataclasses
import random
import re
from collections.abc import Mapping, Sequence
from typing import Literal

from mmpo_jax.benchmarks.benchmark import Files, Scores, benchmark, share
from mmpo_jax.benchmarks.rewards import has_rewards, rewards_in_order
from mmpo_jax.benchmarks.tables import Row
from mmpo_jax.core.errors import MmpoError

Verdict = Literal["agree", "reject", "doesntMatch"]
VERDICTS: tuple[Verdict, ...] = ("agree", "reject", "doesntMatch")
GROUPS = ("reasoning", "hallucination", "general")
SAMPLES = (1, 3, 5, 7, 9)
"""Judgements of an item of which the majority counts, each in its turn."""
SHUFFLE_SEED = 1234
"""Of the official script."""

_JUDGEMENT = re.compile(
    r"(?:Overall Judgment|Therefore).*"
    r"Answer\s*(\d+)\s*is\s*(?:the\s*)?(?:slightly\s*)?better",
    re.IGNORECASE,
)


@dataclasses.dataclass(frozen=True)
class Judged:
    """One judgement of an item."""

    item: str
    """What two judgements of the same item share."""
    id: str
    group: str
    verdict: Verdict


@benchmark(
    source="huggingface.co/datasets/MMInstruction/VL-RewardBench, data/test-*.parquet",
    answers="judgements as the official script keeps them (`id`, `query`, `response`, `ranking`, "
    "`meta`), or `rewards: [of the first response, of the second]` for every row, in order",
)
def vl_rewardbench(files: Files, answers: Sequence[Row]) -> Scores:
    """Agreement with people's preference, of every group, of all items (Overall Accuracy) and as
    the mean of the groups (Macro Average Acc), in percent.

    Of judgements, the official script shuffles the file, takes the first k of every item, and
    counts the majority; items whose majority could not be read, or that have none, are left out of
    the denominators. It does so for k = 1, 3, 5, 7 and 9. Of rewards there is one judgement an
    item, and a tie disagrees.
    """
    if has_rewards(answers):
        return _rewards_scores(_of_rewards(files, answers))
    judged = [_read(row) for row in answers]
    coin = random.Random(SHUFFLE_SEED)
    metrics: dict[str, float] = {}
    beside: dict[str, float] = {}
    for samples in SAMPLES:
        majorities = _majorities(_shuffled(judged, coin), samples)
        for name, value in _metrics(majorities, judged).items():
            metrics[f"{name} (k={samples})"] = value
        left_out = sum(value not in ("agree", "reject") for value in majorities.values())
        beside[f"items_left_out (k={samples})"] = left_out
    counts = collections.Counter(one.verdict for one in judged)
    beside |= {"unread": share(counts["doesntMatch"], len(judged)), "judgements": len(judged)}
    return Scores(metrics, beside, [dataclasses.asdict(one) for one in judged])


def _rewards_scores(judged: Sequence[Judged]) -> Scores:
    """Of one judgement an item, with ties as disagreement."""
    counted = {one.item: "agree" if one.verdict == "agree" else "reject" for one in judged}
    ties = sum(one.verdict == "doesntMatch" for one in judged)
    rows = [dataclasses.asdict(one) for one in judged]
    return Scores(_metrics(counted, judged), {"ties": ties, "items": len(judged)}, rows)


def read_judgement(text: str) -> int | None:
    """The number of the answer that a judge's words call better; None where they name none."""
    match = _JUDGEMENT.search(text.replace("\n", "").replace("*", ""))
    return int(match.group(1)) if match else None


def group_of(name: str) -> str:
    """The group of an item by its id."""
    prefix = re.split("[_-]", name, maxsplit=1)[0]
    if prefix in ("mathverse", "mmmu"):
        return "reasoning"
    return "hallucination" if prefix in ("RLAIF", "RLHF", "hallucination") else "general"


def _read(row: Row) -> Judged:
    """A judgement by the official rule, read anew from the judge's words."""
    meta, ranking = row.need("meta"), _ranking(row)
    responses = row.need("response")
    if not isinstance(responses, list) or not all(isinstance(one, str) for one in responses):
        raise MmpoError(f"{row.name}: `response` is no list of texts")
    if not isinstance(meta, Mapping) or not {"filter_choice", "random_number"} <= meta.keys():
        raise MmpoError(f"{row.name}: `meta` has no `filter_choice` and `random_number`")
    worse = ranking.index(1 if meta["random_number"] == 0 else 0) + 1
    number = read_judgement(str(meta["filter_choice"]))
    verdict: Verdict = "doesntMatch" if number is None else "reject" if number == worse else "agree"
    name = row.text("id")
    item = name + row.text("query") + "\t".join(sorted(responses))
    return Judged(item, name, group_of(name), verdict)


def _of_rewards(files: Files, answers: Sequence[Row]) -> list[Judged]:
    questions = files.rows("test-*.parquet", "*.parquet", "*.jsonl", "*.json")
    found = []
    for place, (question, rewards) in enumerate(rewards_in_order(questions, answers, "id")):
        ranking = _ranking(question)
        better, worse = rewards[ranking.index(0)], rewards[ranking.index(1)]
        verdict: Verdict = (
            "agree" if better > worse else "reject" if worse > better else "doesntMatch"
        )
        name = question.text("id")
        found.append(Judged(f"{place} {name}", name, group_of(name), verdict))
    return found


def _ranking(row: Row) -> list[int]:
    """[0, 1] where the first response is better, [1, 0] where the second is.

    Raises:
      MmpoError: it is neither.
    """
    ranking = row.need("human_ranking", "ranking")
    if ranking not in ([0, 1], [1, 0]):
        raise MmpoError(f"{row.name}: the ranking is {ranking!r:.80}, not [0, 1] or [1, 0]")
    return list(ranking)


def _shuffled(judged: list[Judged], coin: random.Random) -> list[Judged]:
    """The judgements in the order in which the official script takes them, which goes on drawing
    from one generator."""
    order = list(judged)
    for place in range(len(order)):
        other = coin.randint(0, len(order) - 1)
        order[place], order[other] = order[other], order[place]
    return order


def _majorities(judged: Sequence[Judged], samples: int) -> dict[str, str]:
    """Item -> what more than half of its first judgements say, or `other`."""
    counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for one in judged:
        if counts[one.item].total() < samples:
            counts[one.item][one.verdict] += 1
    return {
        item: next((name for name in VERDICTS if count[name] > count.total() / 2), "other")
        for item, count in counts.items()
    }


def _metrics(majorities: Mapping[str, str], judged: Sequence[Judged]) -> dict[str, float]:
    groups = {one.item: one.group for one in judged}
    counts = collections.Counter((groups[item], value) for item, value in majorities.items())
    agree = {group: counts[group, "agree"] for group in GROUPS}
    read = {group: agree[group] + counts[group, "reject"] for group in GROUPS}
    shares = {group: 100 * share(agree[group], read[group]) for group in GROUPS}
    return {
        **shares,
        "Overall Accuracy": 100 * share(sum(agree.values()), sum(read.values())),
        "Macro Average Acc": sum(shares.values()) / len(GROUPS),
    }
