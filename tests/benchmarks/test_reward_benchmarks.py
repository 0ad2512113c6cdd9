"""Benchmarks of rewards and judges on made-up answers, and the official numbers where the files are
at hand (MMPO_EVALUATION_DATA, MMPO_MM_REWARD_BENCH)."""

import json
import math
import os
import random
from pathlib import Path

import pytest
from helpers.benchmarks import published, scored, write

from mmpo_jax.benchmarks.benchmark import score_answers
from mmpo_jax.benchmarks.multimodal_rewardbench import verdict
from mmpo_jax.benchmarks.vl_rewardbench import group_of, read_judgement
from mmpo_jax.core.errors import MmpoError

# Rewards ------------------------------------------------------------------------------------------


def reward_questions():
    paths = ["mcq/1.png", "mcq/1.png", "long/2.png", "video/3"]
    keys = ["image", "image", "image", "video"]
    return [
        {"id": f"id {path}", key: path, "prompt": "?", "chosen": "a", "rejected": "b"}
        for path, key in zip(paths, keys, strict=True)
    ]


def test_accuracy_of_pairs_and_of_questions(tmp_path):
    rewards = [[2, 1], [1, 1], [0.5, -1], [0, 1]]
    questions = reward_questions()
    answers = [
        {"id": name, "rewards": pair}
        for name, pair in zip(
            ["id mcq/1.png", "id mcq/1.png (row 2)", "id long/2.png", "id video/3"],
            rewards,
            strict=True,
        )
    ]
    scores = scored("mm_rlhf_rewardbench", tmp_path, questions, answers)
    assert scores.metrics["Overall Accuracy"] == 0.5
    assert scores.metrics["Overall ACC+"] == pytest.approx(1 / 3)
    assert scores.metrics["mcq Accuracy"] == 0.5 and scores.metrics["mcq ACC+"] == 0
    assert math.isnan(scores.metrics["safety Accuracy"])
    assert scores.beside["ties"] == 1
    with pytest.raises(MmpoError, match=r"row 1: has the id 'id long/2.png', the question there"):
        scored("mm_rlhf_rewardbench", tmp_path, questions, answers[2:] + answers[:2])
    with pytest.raises(MmpoError, match=r"rewards of 3 rows, .* has 4"):
        scored("mm_rlhf_rewardbench", tmp_path, questions, answers[:3])
    with pytest.raises(MmpoError, match=r"row 2: `rewards` are not two numbers but \[1\]"):
        wrong = [answers[0], {**answers[1], "rewards": [1]}, *answers[2:]]
        scored("mm_rlhf_rewardbench", tmp_path, questions, wrong)


def test_the_coin_of_multimodal_rewardbench(tmp_path):
    assert [verdict(t) for t in ("[[B]] and [[A]]", "so [[B]]", "A")] == ["A", "B", None]
    outputs = ["[[A]]", "none", "[[B]]", "none", "None"]
    categories = ["safety", "safety", "reasoning", "general", "reasoning"]
    names = ["pairs1", "hate", "Math7", "x", "livecode"]
    answers = [
        {"ID": name, "Label": "A", "Meta": {"Category": category}, "output": output}
        for name, category, output in zip(names, categories, outputs, strict=True)
    ]
    random.seed(123)
    tossed = [random.random() < 0.5 for _ in range(3)]
    right = [True, tossed[0], False, tossed[1], tossed[2]]
    metrics = scored("multimodal_rewardbench", tmp_path, [], answers).metrics
    assert metrics["acc all"] == sum(right) / 5
    assert metrics["acc safety/bias"] == 1 and metrics["acc reasoning/math"] == 0
    assert metrics["acc safety/toxicity"] == tossed[0]
    assert metrics["acc reasoning/coding"] == tossed[2]
    strict = scored("multimodal_rewardbench", tmp_path, [], answers, unparsed_is_wrong=True)
    assert strict.metrics["acc all"] == 1 / 5 and strict.beside["unparsed"] == 3


def test_rewards_of_multimodal_rewardbench(tmp_path):
    names = ["Math1", "code2", "nocaps3"]
    questions = [
        {"ID": name, "Category": category, "Better": better}
        for name, category, better in zip(
            names,
            ["reasoning", "reasoning", "general"],
            ["Output1", "Output2", "Output1"],
            strict=True,
        )
    ]
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "all_data.json").write_text(json.dumps(questions))
    answers = [
        {"id": n, "rewards": r} for n, r in zip(names, [[2, 1], [0, 3], [1, 1]], strict=True)
    ]
    metrics = scored("multimodal_rewardbench", tmp_path, None, answers).metrics
    assert metrics["acc all"] == pytest.approx(2 / 3)
    assert metrics["acc reasoning/math"] == metrics["acc reasoning/coding"] == 1
    assert metrics["acc general"] == 0


# VL-RewardBench -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("Overall Judgment: Answer 2 is better.", 2),
        ("**Overall Judgment**:\nAnswer 1 is the slightly better", 1),
        ("Therefore, answer 1 is better. Overall Judgment: Answer 2 is better", 2),
        ("Answer 1 is better.", None),
        ("Overall Judgment: both are good", None),
    ],
)
def test_how_judgements_are_read(text, number):
    assert read_judgement(text) == number


def test_groups_of_ids():
    names = [
        "mathverse_1",
        "mmmu-3",
        "RLAIF-V_2",
        "RLHF-V-1",
        "hallucination_pair-4",
        "wildvision-9",
    ]
    groups = ["reasoning"] * 2 + ["hallucination"] * 3 + ["general"]
    assert [group_of(name) for name in [*names, "jailbreak"]] == [*groups, "general"]


def judgements(seed):
    """Ten of each of 120 items, a third of which cannot be read."""
    drawn = random.Random(seed)
    for number in range(120):
        prefix = drawn.choice(["mmmu", "RLAIF-V", "hallucination", "wildvision", "politics"])
        ranking = drawn.choice([[0, 1], [1, 0]])
        for _ in range(10):
            said = drawn.choice(["Answer 1 is better", "Answer 2 is better", "no idea"])
            yield {
                "id": f"{prefix}_{number}",
                "query": "?",
                "response": ["a", "b"],
                "ranking": ranking,
                "meta": {
                    "filter_choice": f"Overall Judgment: {said}",
                    "random_number": drawn.choice([0, 1]),
                },
            }


def majority_accuracies(rows):
    """The published procedure once more, step by step: k -> (share of each group, pooled, mean)."""
    random.seed(1234)
    found = {}
    for k in (1, 3, 5, 7, 9):
        order = list(rows)
        for i in range(len(order)):
            j = random.randint(0, len(order) - 1)
            order[i], order[j] = order[j], order[i]
        tallies = {}
        for row in order:
            tally = tallies.setdefault(row["id"], [])
            if len(tally) == k:
                continue
            shown_second = row["meta"]["random_number"] == 1
            better_is = row["ranking"].index(1 if shown_second else 0) + 1
            words = row["meta"]["filter_choice"]
            tally.append(None if "idea" in words else f"Answer {better_is} " in words)
        right, read = dict.fromkeys("rhg", 0), dict.fromkeys("rhg", 0)
        for name, tally in tallies.items():
            group = "r" if name[0] == "m" else "h" if name[0] in "Rh" else "g"
            for value in (True, False):
                if tally.count(value) * 2 > len(tally):
                    read[group] += 1
                    right[group] += value
        shares = [100 * right[group] / read[group] for group in "rhg"]
        found[k] = [*shares, 100 * sum(right.values()) / sum(read.values()), sum(shares) / 3]
    return found


@pytest.mark.parametrize("seed", [0, 1])
def test_majorities_of_judgements(tmp_path, seed):
    rows = list(judgements(seed))
    metrics = scored("vl_rewardbench", tmp_path, [], rows).metrics
    names = ["reasoning", "hallucination", "general", "Overall Accuracy", "Macro Average Acc"]
    for k, values in majority_accuracies(rows).items():
        ours = [metrics[f"{name} (k={k})"] for name in names]
        assert ours == pytest.approx(values)


def test_rewards_of_vl_rewardbench(tmp_path):
    names = ["mmmu_1", "RLAIF-V_2", "RLAIF-V_2", "politics"]
    questions = [
        {"id": name, "query": str(place), "response": ["a", "b"], "human_ranking": ranking}
        for place, (name, ranking) in enumerate(
            zip(names, [[0, 1], [1, 0], [0, 1], [0, 1]], strict=True)
        )
    ]
    answers = [
        {"id": n, "rewards": r}
        for n, r in zip(names, [[2, 1], [2, 1], [2, 1], [1, 1]], strict=True)
    ]
    scores = scored("vl_rewardbench", tmp_path, questions, answers)
    assert scores.metrics == pytest.approx(
        {
            "reasoning": 100,
            "hallucination": 50,
            "general": 0,
            "Overall Accuracy": 50,
            "Macro Average Acc": 50,
        }
    )
    assert scores.beside["ties"] == 1


# Official outputs ---------------------------------------------------------------------------------


@published
@pytest.mark.skipif(
    "MMPO_MM_REWARD_BENCH" not in os.environ,
    reason="MMPO_MM_REWARD_BENCH does not name MM-RLHF's mm_reward_bench.jsonl",
)
def test_rewardbench_as_the_official_script(tmp_path):
    folder = Path(os.environ["MMPO_EVALUATION_DATA"]) / "mm_rlhf_rewardbench"
    expected = json.loads((folder / "mm_reward_bench_expected.json").read_text())
    rewards = next(value for key, value in expected.items() if key.startswith("rewards"))
    given = write(tmp_path / "answers.jsonl", [{"rewards": pair} for pair in rewards])
    data = os.environ["MMPO_MM_REWARD_BENCH"]
    out = str(tmp_path / "out.json")
    metrics = score_answers("mm_rlhf_rewardbench", data, given, out).metrics
    category = "Overall"
    compared = 0
    for line in expected["printed"]:
        name, _, value = line.rpartition(": ")
        if name == "Category":
            category = value
        elif name.endswith(("Accuracy", "ACC+")):
            key = name if name.startswith("Overall") else f"{category} {name}"
            assert f"{metrics[key]:.2f}" == value
            compared += 1
    assert compared == 12
