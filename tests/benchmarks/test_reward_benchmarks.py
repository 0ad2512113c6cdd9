"""Benchmarks of rewards and judges on made-up answers, and the official numbers where the files are
at hand (MMPO_EVALUATION_DATA, MMPO_MM_REWARD_BENCH)."""

import json
import math
import os
import random
from pathlib import Path

import pytest
from helpers.benchmarks import published, scored, write

from mmpo_jax.benchmarks.multimodal_rewardbench import verdict
from mmpo_jax.benchmarks.score_files import score_answers
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
    # By the names that our commands give rows: in any order, and some may be missing.
    turned = scored("mm_rlhf_rewardbench", tmp_path, questions, answers[2:] + answers[:2])
    assert (turned.metrics["Overall ACC+"], turned.rows) == (1 / 3, scores.rows)
    fewer = scored("mm_rlhf_rewardbench", tmp_path, questions, answers[1:])
    assert fewer.metrics["mcq Accuracy"] == 0 and fewer.beside["without_rewards"] == 1
    assert fewer.beside["ties"] == 1
    with pytest.raises(MmpoError, match=r"row 2: .* has no row called 'id mcq/1.png \(row 3\)'"):
        wrong = [answers[0], {**answers[1], "id": "id mcq/1.png (row 3)"}, *answers[2:]]
        scored("mm_rlhf_rewardbench", tmp_path, questions, wrong)
    # By their order, where they have the benchmark's own ids, or none.
    given = [
        {"id": question["id"], "rewards": pair}
        for question, pair in zip(questions, rewards, strict=True)
    ]
    ordered = scored("mm_rlhf_rewardbench", tmp_path, questions, given)
    assert ordered.rows == scores.rows
    with pytest.raises(MmpoError, match=r"row 1: has the id 'id long/2.png', the question there"):
        scored("mm_rlhf_rewardbench", tmp_path, questions, given[2:] + given[:2])
    with pytest.raises(MmpoError, match=r"rewards of 3 rows, .* has 4"):
        scored("mm_rlhf_rewardbench", tmp_path, questions, given[:3])
    with pytest.raises(MmpoError, match=r"row 2: `rewards` are not two numbers but \[1\]"):
        wrong = [answers[0], {**answers[1], "rewards": [1]}, *answers[2:]]
        scored("mm_rlhf_rewardbench", tmp_path, questions, wrong)


@pytest.mark.parametrize(
    "name", ["mm_rlhf_rewardbench", "vl_rewardbench", "multimodal_rewardbench"]
)
def test_rewards_that_are_no_numbers(tmp_path, name):
    """Null is a response without a reward, which is wrong and no tie; NaN is refused."""
    questions = {
        "mm_rlhf_rewardbench": reward_questions(),
        "vl_rewardbench": vl_questions(["mmmu_1", "RLAIF-V_2", "RLAIF-V_2", "politics"]),
        "multimodal_rewardbench": multimodal_questions(["Math1", "code2", "pairs3", "x"]),
    }[name]
    rewards = [[2, 1], [None, 1], [None, None], [1, 1]]
    scores = scored(name, tmp_path, questions, [{"rewards": pair} for pair in rewards])
    assert scores.beside["without_rewards"] == 2
    assert scores.beside.get("ties", 1) == 1
    overall = {"vl_rewardbench": "Overall Accuracy", "multimodal_rewardbench": "acc all"}
    total = 100 if name == "vl_rewardbench" else 1
    assert scores.metrics[overall.get(name, "Overall Accuracy")] == total / 4
    for value in (math.nan, math.inf):
        wrong = [{"rewards": pair} for pair in (*rewards[:2], [1, value], [0, 1])]
        with pytest.raises(MmpoError, match=r"row 3: `rewards` are \[1, \w+\], no finite numbers"):
            scored(name, tmp_path, questions, wrong)


def vl_questions(names, ranking=(0, 1)):
    return [
        {"id": name, "query": f"<image>\n{n}", "response": ["a", "b"], "human_ranking": [*ranking]}
        for n, name in enumerate(names)
    ]


def multimodal_questions(names, better="Output1", category="reasoning"):
    return [{"ID": name, "Category": category, "Better": better} for name in names]


def test_replies_of_a_judge_to_pairs_as_questions(tmp_path):
    """Both orders count a half each, a judge that goes by places has ties, and what cannot be read
    counts nothing."""
    questions = vl_questions(["politics", "politics"], ranking=(1, 0))
    names = ["politics", "politics (row 2)"]

    def replies(*said):
        pairs = [(name, order) for name in names for order in "12"]
        return [
            {"id": f"{name}/1-0/{order}", "prompt": "?", "responses": [text]}
            for (name, order), text in zip(pairs, said, strict=True)
        ]

    def accuracy(*said):
        scores = scored("vl_rewardbench", tmp_path, questions, replies(*said))
        return scores.metrics["general"], scores.beside["ties"], scores.beside["without_rewards"]

    one, two = "<answer> 1 </answer>", "<answer> 2 </answer>"
    assert accuracy(one, two, one, two) == (100, 0, 0)
    assert accuracy(two, one, one, one) == (0, 1, 0)
    assert accuracy(one, "none", "none", "none") == (50, 0, 1)


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
    questions = [
        {"ID": name, "Category": category, "Better": "Output1"}
        for name, category in zip(names, categories, strict=True)
    ]
    metrics = scored("multimodal_rewardbench", tmp_path, questions, answers).metrics
    assert metrics["acc all"] == sum(right) / 5
    assert metrics["acc safety/bias"] == 1 and metrics["acc reasoning/math"] == 0
    assert metrics["acc safety/toxicity"] == tossed[0]
    assert metrics["acc reasoning/coding"] == tossed[2]
    strict = scored("multimodal_rewardbench", tmp_path, questions, answers, unparsed_is_wrong=True)
    assert strict.metrics["acc all"] == 1 / 5 and strict.beside["unparsed"] == 3
    alone = [{"output": text} for text in outputs]  # as the leaderboard wants them
    assert scored("multimodal_rewardbench", tmp_path, questions, alone).metrics == metrics
    ours = [{"id": name, "response": text} for name, text in zip(names, outputs, strict=True)]
    assert scored("multimodal_rewardbench", tmp_path, questions, ours).metrics == metrics
    with pytest.raises(MmpoError, match=r"row 1: has the id 'pairs1', .*row 1 has 'hate'"):
        turned = [questions[1], questions[0], *questions[2:]]
        scored("multimodal_rewardbench", tmp_path, turned, answers)
    with pytest.raises(MmpoError, match=r"row 3: has the label 'A', .*row 3 has 'B'"):
        other = [*questions[:2], questions[2] | {"Better": "Output2"}, *questions[3:]]
        scored("multimodal_rewardbench", tmp_path, other, answers)
    with pytest.raises(MmpoError, match=r"has 4 answers, .* has 5 rows"):
        scored("multimodal_rewardbench", tmp_path, questions, answers[:4])


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
    items = {row["id"]: row for row in rows}.values()
    questions = [
        {"id": row["id"], "query": "?", "response": ["a", "b"], "human_ranking": row["ranking"]}
        for row in items
    ]
    scores = scored("vl_rewardbench", tmp_path, [*questions, *vl_questions(["x"])], rows)
    metrics = scores.metrics
    assert scores.beside["items_not_judged"] == 1
    names = ["reasoning", "hallucination", "general", "Overall Accuracy", "Macro Average Acc"]
    for k, values in majority_accuracies(rows).items():
        ours = [metrics[f"{name} (k={k})"] for name in names]
        assert ours == pytest.approx(values)


def test_judgements_of_what_is_not_there(tmp_path):
    rows = list(judgements(0))[:1]
    name, ranking = rows[0]["id"], rows[0]["ranking"]
    question = {"id": name, "query": "<image>\n?", "response": ["a", "b"]}
    scored("vl_rewardbench", tmp_path, [question | {"human_ranking": ranking}], rows)
    with pytest.raises(MmpoError, match=r"row 1: .* has no such query and responses"):
        scored("vl_rewardbench", tmp_path, vl_questions(["x"]), rows)
    with pytest.raises(MmpoError, match=r"row 1: ranks the responses as .*questions.jsonl as"):
        turned = question | {"human_ranking": ranking[::-1]}
        scored("vl_rewardbench", tmp_path, [turned], rows)


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
