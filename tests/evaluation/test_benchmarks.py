"""Scorers of benchmarks: their rules on answers made up here, and the official scripts' numbers
where their files are at hand (MMPO_EVALUATION_DATA, MMPO_MM_REWARD_BENCH)."""

import itertools
import json
import math
import os
import random
from pathlib import Path

import openpyxl
import pytest

from mmpo_jax.cli import main
from mmpo_jax.core.errors import MmpoError
from mmpo_jax.evaluation.benchmark import benchmarks, score_answers
from mmpo_jax.evaluation.mmstar import choice
from mmpo_jax.evaluation.multimodal_rewardbench import verdict
from mmpo_jax.evaluation.pope import official, whole_word
from mmpo_jax.evaluation.vl_rewardbench import group_of, read_judgement

published = pytest.mark.skipif(
    "MMPO_EVALUATION_DATA" not in os.environ,
    reason="MMPO_EVALUATION_DATA does not name a folder of benchmarks' files",
)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def scored(name, tmp_path, questions, answers, **options):
    """Scores of rows that are written to files first."""
    folder = tmp_path / "data"
    folder.mkdir(exist_ok=True)
    if questions is not None:
        write(folder / "questions.jsonl", questions)
    given = write(tmp_path / "answers.jsonl", answers)
    return score_answers(name, str(folder), given, str(tmp_path / "out.json"), options)


# POPE ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "as_official", "by_words"),
    [
        ("Yes.", "yes", "yes"),
        ("No, there is none", "no", "no"),
        ("NO", "yes", "no"),
        ("There is not. Yes", "no", "yes"),
        ("It isn't", "yes", None),
        ("Yes, it is not hidden", "no", "yes"),
        ("no\nsuch thing", "yes", "no"),
        ("", "yes", None),
    ],
)
def test_how_pope_reads_answers(answer, as_official, by_words):
    assert official(answer) == as_official
    assert whole_word(answer) == by_words


def asked(labels):
    return [
        {"question_id": place, "text": f"Is there a {place}?", "label": label, "image": "a.jpg"}
        for place, label in enumerate(labels, 1)
    ]


def test_pope_counts(tmp_path):
    said = ["yes", "no", "Yes", "no", "yes"]
    answers = [{"question": f"Is there a {n}?", "answer": s} for n, s in enumerate(said, 1)]
    scores = scored("pope", tmp_path, asked(["yes", "yes", "no", "no", "yes"]), answers)
    assert scores.metrics == pytest.approx(
        {
            "Accuracy": 3 / 5,
            "Precision": 2 / 3,
            "Recall": 2 / 3,
            "F1 score": 2 / 3,
            "Yes ratio": 0.6,
        }
    )
    backwards = [{"id": str(n), "response": s} for n, s in enumerate(said, 1)][::-1]
    assert scored("pope", tmp_path, None, backwards).metrics == scores.metrics


def test_pope_without_a_yes_has_no_precision(tmp_path):
    scores = scored("pope", tmp_path, asked(["yes", "no"]), [{"answer": "no"}, {"answer": "no"}])
    assert math.isnan(scores.metrics["Precision"]) and scores.metrics["Accuracy"] == 0.5
    assert json.loads((tmp_path / "out.json").read_text())["metrics"]["Precision"] is None


def test_pope_finds_the_file_that_was_answered(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for kind, other in (("random", "cat"), ("popular", "dog")):
        rows = [{**row, "text": f"Is there a {other}?"} for row in asked(["yes", "no"])]
        write(folder / f"coco_pope_{kind}.json", rows)
    given = [{"question": "Is there a dog?", "answer": "yes"}] * 2
    scores = scored("pope", tmp_path, None, given)
    assert scores.beside["questions"] == 2 and scores.metrics["Accuracy"] == 0.5
    with pytest.raises(MmpoError, match=r"more than one of the question files .* name one"):
        scored("pope", tmp_path, None, [{"id": "1", "response": "yes"}])


# MMStar -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "b"),
        (" (c) the cat", "c"),
        ("Option D", "d"),
        ("The answer is A.", "a"),
        ("An apple", "a"),
        ("It is B", None),
        ("", None),
        ("(", None),
    ],
)
def test_how_mmstar_reads_answers(answer, letter):
    assert choice(answer) == letter


def star(index, category, skill, label, prediction):
    return {
        "index": index,
        "question": "Which?",
        "answer": label,
        "category": category,
        "l2_category": skill,
        "prediction": prediction,
    }


def test_mmstar_from_a_table_of_excel(tmp_path):
    rows = [
        star(0, "math", "geometry", "A", "A"),
        star(1, "math", "geometry", "A", "(b)"),
        star(2, "math", "numbers", "C", "option c"),
        star(3, "science", "energy", "D", "none of them"),
    ]
    book = openpyxl.Workbook()
    book.active.append(list(rows[0]))
    for row in rows:
        book.active.append(list(row.values()))
    book.save(tmp_path / "predictions.xlsx")
    given = str(tmp_path), str(tmp_path / "predictions.xlsx"), str(tmp_path / "out.json")
    scores = score_answers("mmstar", *given)
    assert scores.metrics["final score"] == 0.5
    assert scores.metrics["math"] == pytest.approx(2 / 3)
    assert scores.metrics["math / geometry"] == 0.5
    assert scores.beside["unreadable"] == 1
    means = score_answers("mmstar", *given, {"average": "lmms_eval"}).metrics
    assert means["math"] == 0.75 and means["final score"] == 0.5


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


# The command --------------------------------------------------------------------------------------


def test_the_command(tmp_path, capsys):
    write(tmp_path / "q.jsonl", asked(["yes", "no"]))
    given = write(
        tmp_path / "answers.jsonl", [{"id": 1, "response": "NO"}, {"id": 2, "response": "no"}]
    )
    command = ["evaluate", "--benchmark", "pope", "--data", str(tmp_path / "q.jsonl")]
    command += ["--responses", given, "--output", str(tmp_path / "out.json")]
    assert main(command) == 0
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["benchmark"] == "pope" and report["metrics"]["Accuracy"] == 1.0
    assert "Accuracy" in capsys.readouterr().out
    assert main([*command, "--rule", "reading=whole_word"]) == 0
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["metrics"]["Accuracy"] == 0.5 and report["options"] == {"reading": "whole_word"}


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--benchmark", "nope"], "there is no benchmark 'nope', only mm_rlhf"),
        (["--rule", "reading=never"], "--rule reading=never: Input should be 'official' or"),
        (["--rule", "strict=1"], "pope has the rules: reading"),
        (
            ["--data", "{}/nowhere"],
            "nowhere: there is no such folder; the files are part of github",
        ),
        (["--data", "{}/empty"], r"empty: has no \*_pope_\*.json or"),
        (["--responses", "{}/empty.jsonl"], "empty.jsonl: has no rows"),
        (["--responses", "{}/other.jsonl"], "other.jsonl, row 1: there is no question '9' in"),
        (["--responses", "{}/twice.jsonl"], "twice.jsonl: several rows have the id '1'"),
        (["--responses", "{}/blank.jsonl"], "blank.jsonl, row 1: has no 'answer' or 'response'"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_what_is_wrong_is_named(tmp_path, capsys, words, told):
    write(tmp_path / "q.jsonl", asked(["yes", "no"]))
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty.jsonl", [])
    write(tmp_path / "other.jsonl", [{"id": 9, "response": "no"}])
    write(tmp_path / "twice.jsonl", [{"id": 1, "response": "no"}] * 2)
    write(tmp_path / "blank.jsonl", [{"id": 1, "said": "no"}])
    given = write(tmp_path / "answers.jsonl", [{"id": 1, "response": "no"}])
    flags = {"--benchmark": "pope", "--data": str(tmp_path / "q.jsonl"), "--responses": given}
    flags |= {"--output": str(tmp_path / "out.json"), words[0]: words[1].format(tmp_path)}
    assert main(["evaluate", *itertools.chain(*flags.items())]) == 1
    assert told.replace("\\", "") in capsys.readouterr().err


def test_every_benchmark_says_what_it_takes(capsys):
    for name in benchmarks():
        assert main(["evaluate", "--benchmark", name]) == 0
        told = capsys.readouterr().out
        assert name in told and "files: " in told and "answers: " in told


@pytest.mark.parametrize(
    "words",
    [[], ["--benchmark", "pope", "--data", "x"], ["recipe.yaml", "--benchmark", "pope"]],
    ids=str,
)
def test_neither_a_recipe_nor_a_benchmark(words):
    with pytest.raises(SystemExit):
        main(["evaluate", *words])


# Official outputs ---------------------------------------------------------------------------------


@published
def test_pope_as_the_official_script(tmp_path):
    folder = Path(os.environ["MMPO_EVALUATION_DATA"]) / "pope"
    expected = json.loads((folder / "pope_expected.json").read_text())
    answers = [{"id": row["question_id"], "response": row["answer"]} for row in expected["input"]]
    given = write(tmp_path / "answers.jsonl", answers)
    data = str(folder / "coco_pope_adversarial.json")
    metrics = score_answers("pope", data, given, str(tmp_path / "out.json")).metrics
    keys = ("accuracy", "precision", "recall", "f1", "yes_ratio")
    assert list(metrics.values()) == [float(expected[key]) for key in keys]


@published
def test_mmstar_as_the_official_script(tmp_path):
    folder = Path(os.environ["MMPO_EVALUATION_DATA"]) / "mmstar"
    expected = json.loads((folder / "mmstar_expected.json").read_text())
    given = str(folder / "llava_next_yi_34b_MMStar.xlsx")
    scores = score_answers("mmstar", str(folder), given, str(tmp_path / "out.json"))
    assert scores.beside["correct"] == expected["correct"]
    assert scores.metrics["final score"] == expected["final score"]
    for part in ("categories", "l2"):
        for name, counts in expected[part].items():
            assert scores.metrics[name] == counts["correct"] / counts["n"]


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
