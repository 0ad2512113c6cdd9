"""VL-RewardBench: which of two responses is better, Li et al. 2024 (arXiv 2411.17451)."""

from __future__ import annotations

import collections
import dataclasses
import random
import re
from collections.abc import Mapping, Sequence
from typing import Literal

from mmpo_jax.benchmarks.benchmark import Files, Scores, benchmark, share
from mmpo_jax.benchmarks.rewards import Pair, has_rewards, match_rewards
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
    "`meta`); or `rewards: [of the first response, of the second]` of every row, as `mmpo reward` "
    "writes them or in order; or replies of a judge to pairs as questions",
)
def vl_rewardbench(files: Files, answers: Sequence[Row]) -> Scores:
    """Agreement with people's preference, of every group, of all items (Overall Accuracy) and as
    the mean of the groups (Macro Average Acc), in percent.

    Of judgements, the official script shuffles the file, takes the first k of every item, and
    counts the majority; items whose majority could not be read, or that have none, are left out of
    the denominators. It does so for k = 1, 3, 5, 7 and 9. Of rewards there is one judgement an
    item, and a tie disagrees, as an item without rewards does.
    """
    questions = files.rows("test-*.parquet", "*.parquet", "*.jsonl", "*.json")
    if has_rewards(answers):
        return _rewards_scores(match_rewards(questions, answers, "id"))
    judged = _of_words(questions, answers)
    coin = random.Random(SHUFFLE_SEED)
    metrics: dict[str, float] = {}
    beside: dict[str, float] = {}
    for samples in SAMPLES:
        majorities = _majorities(_shuffled(judged, coin), samples)
        for name, value in _metrics(majorities, judged).items():
            metrics[f"{name} (k={samples})"] = value
        left_out = sum(value not in ("agree", "reject") for value in majorities.values())
        beside[f"items_left_out (k={samples})"] = left_out
    beside["items_not_judged"] = len({*map(_item, questions)} - {one.item for one in judged})
    counts = collections.Counter(one.verdict for one in judged)
    beside |= {"unread": share(counts["doesntMatch"], len(judged)), "judgements": len(judged)}
    return Scores(metrics, beside, [dataclasses.asdict(one) for one in judged])


def _rewards_scores(matched: Sequence[tuple[Row, Pair | None]]) -> Scores:
    """Of one judgement an item; what does not agree disagrees."""
    judged, counted = [], {}
    for place, (question, rewards) in enumerate(matched):
        name, verdict = question.text("id"), _by_rewards(_ranking(question), rewards)
        one = Judged(f"{place} {name}", name, group_of(name), verdict)
        judged.append(one)
        counted[one.item] = "agree" if verdict == "agree" else "reject"
    beside = {
        "ties": sum(pair is not None and pair[0] == pair[1] for _, pair in matched),
        "without_rewards": sum(pair is None for _, pair in matched),
        "items": len(judged),
    }
    return Scores(_metrics(counted, judged), beside, [dataclasses.asdict(one) for one in judged])


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


def _of_words(questions: Sequence[Row], answers: Sequence[Row]) -> list[Judged]:
    """The judgements of a judge's words, each of an item of the benchmark.

    Raises:
      MmpoError: one is of no such item, or ranks its responses otherwise.
    """
    rankings = {_item(question): _ranking(question) for question in questions}
    judged = []
    for row in answers:
        item, ranking = _item(row), _ranking(row)
        if item not in rankings:
            raise MmpoError(f"{row.name}: {questions[0].file} has no such query and responses")
        if ranking != rankings[item]:
            raise MmpoError(
                f"{row.name}: ranks the responses as {ranking}, {questions[0].file} as "
                f"{rankings[item]}"
            )
        judged.append(_read(row, item, ranking))
    return judged


def _item(row: Row) -> str:
    """What two judgements of the same item share: id, query and both responses."""
    responses = row.need("response")
    if not isinstance(responses, list) or not all(isinstance(one, str) for one in responses):
        raise MmpoError(f"{row.name}: `response` is no list of texts")
    query = row.text("query").replace("<image>\n", "").strip()
    return row.text("id") + query + "\t".join(sorted(responses))


def _read(row: Row, item: str, ranking: Sequence[int]) -> Judged:
    """A judgement by the official rule, read anew from the judge's words."""
    meta = row.need("meta")
    if not isinstance(meta, Mapping) or not {"filter_choice", "random_number"} <= meta.keys():
        raise MmpoError(f"{row.name}: `meta` has no `filter_choice` and `random_number`")
    worse = ranking.index(1 if meta["random_number"] == 0 else 0) + 1
    number = read_judgement(str(meta["filter_choice"]))
    verdict: Verdict = "doesntMatch" if number is None else "reject" if number == worse else "agree"
    name = row.text("id")
    return Judged(item, name, group_of(name), verdict)


def _by_rewards(ranking: Sequence[int], rewards: Pair | None) -> Verdict:
    if rewards is None:
        return "doesntMatch"
    better, worse = rewards[ranking.index(0)], rewards[ranking.index(1)]
    return "agree" if better > worse else "reject" if worse > better else "doesntMatch"


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
