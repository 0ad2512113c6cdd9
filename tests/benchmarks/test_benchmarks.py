"""POPE and MMStar on answers made up here, the command, and the official scripts' numbers where
their files are at hand (MMPO_EVALUATION_DATA)."""

import base64
import itertools
import json
import math
import os
from pathlib import Path

import openpyxl
import pytest
from etils import epath
from helpers.benchmarks import assert_rows_add_up, published, scored, write
from helpers.pictures import encode, noise

from mmpo_jax.benchmarks.benchmark import Files, benchmarks, find_benchmark
from mmpo_jax.benchmarks.mmstar import choice
from mmpo_jax.benchmarks.pope import official, whole_word
from mmpo_jax.benchmarks.score_files import score_answers
from mmpo_jax.cli import main
from mmpo_jax.core.errors import MmpoError

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
    assert_rows_add_up("pope", scores)
    backwards = [{"id": str(n), "response": s} for n, s in enumerate(said, 1)][::-1]
    assert scored("pope", tmp_path, None, backwards).metrics == scores.metrics


def test_pope_without_a_yes_has_no_precision(tmp_path):
    scores = scored("pope", tmp_path, asked(["yes", "no"]), [{"answer": "no"}, {"answer": "no"}])
    assert math.isnan(scores.metrics["Precision"]) and scores.metrics["Accuracy"] == 0.5
    assert json.loads((tmp_path / "out.json").read_text())["metrics"]["Precision"] is None


def test_answers_as_generate_writes_them_and_of_other_questions(tmp_path):
    answers = [{"id": str(number), "responses": ["no"]} for number in (1, 2)]
    assert scored("pope", tmp_path, asked(["yes", "no"]), answers).metrics["Accuracy"] == 0.5
    with pytest.raises(MmpoError, match=r"row 1: `responses` is no list of one answer"):
        scored("pope", tmp_path, None, [{"id": "1", "responses": ["no", "yes"]}])
    with pytest.raises(MmpoError, match=r"row 1: the answer is no text but \['no'\]"):
        scored("pope", tmp_path, None, [{"id": "1", "response": ["no"]}])
    with pytest.raises(MmpoError, match=r"row 2: has no id or question_id, which other rows have"):
        scored("pope", tmp_path, None, [{"id": "2", "response": "no"}, {"response": "no"}])
    with pytest.raises(MmpoError, match=r"row 1: answers 'Is there a cat\?', and .* asks"):
        scored("pope", tmp_path, None, [{"question": "Is there a cat?", "answer": "no"}])
    with pytest.raises(MmpoError, match=r"row 1: has no 'prediction' or 'response', only index"):
        folder = tmp_path / "data"
        rows = [star(0, "math", "geometry", "A", None)]
        write(folder / "questions.jsonl", [{k: v for k, v in rows[0].items() if v is not None}])
        scored("mmstar", tmp_path, None, [{"index": 0, "said": "A"}])


def test_pope_finds_the_file_that_was_answered(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for kind, other in (("random", "cat"), ("popular", "dog")):
        rows = [{**row, "text": f"Is there a {other}?"} for row in asked(["yes", "no"])]
        write(folder / f"coco_pope_{kind}.json", rows)
    given = [{"question": "Is there a dog?", "answer": "yes"}] * 2
    scores = scored("pope", tmp_path, None, given)
    assert scores.beside["questions"] == 2 and scores.metrics["Accuracy"] == 0.5
    by_pandas = [{**row, "id": math.nan} for row in given]  # which writes that for nothing
    assert scored("pope", tmp_path, None, by_pandas).metrics == scores.metrics
    by_id = [{"id": 2, "question": "Is there a dog?\nAnswer shortly.", "answer": "no"}]
    assert scored("pope", tmp_path, None, by_id).metrics["Accuracy"] == 1
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


def test_a_question_that_mmstar_has_no_answer_to_is_wrong(tmp_path):
    questions = [star(n, "math", "geometry", "A", None) for n in range(4)]
    asked = [{k: v for k, v in row.items() if v is not None} for row in questions]
    scores = scored("mmstar", tmp_path, asked, [{"id": "2", "response": "A"}])
    assert scores.metrics["final score"] == 0.25
    assert (scores.beside["answers"], scores.beside["questions"]) == (1, 4)


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
    assert_rows_add_up("mmstar", scores)
    means = score_answers("mmstar", *given, {"average": "lmms_eval"})
    assert means.metrics["math"] == 0.75 and means.metrics["final score"] == 0.5
    assert_rows_add_up("mmstar", means)


# What a model is asked ----------------------------------------------------------------------------


def questions(name, data, images=None, **options):
    chosen = find_benchmark(name)
    (asked,) = chosen.asks(Files(data, chosen.source, images, chosen.images), **options)
    return asked


def test_questions_of_pope_and_their_images(tmp_path):
    folder = epath.Path(tmp_path)
    write(tmp_path / "q.jsonl", asked(["yes", "no"]))
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.jpg").write_bytes(b"picture")
    found = questions("pope", folder / "q.jsonl", folder / "images", suffix=" ?")
    assert (found.temperature, found.max_new_tokens) == (0, 16)
    assert [(record.id, record.prompt[0].content) for record in found.records] == [
        ("1", "Is there a 1? ?"),
        ("2", "Is there a 2? ?"),
    ]
    assert found.records[0].images[0].read() == b"picture"
    told = r"q.jsonl, row 1: .*a.jpg.* as images; these are the images of COCO val2014"
    with pytest.raises(MmpoError, match=told):
        questions("pope", folder / "q.jsonl")
    write(tmp_path / "r.jsonl", asked(["yes"]))
    with pytest.raises(MmpoError, match=r"has several question files; name one, as .*q.jsonl"):
        questions("pope", folder)


def test_questions_of_mmstar_hold_their_images(tmp_path):
    picture = base64.b64encode(encode(noise("RGB", 8, 8))).decode()
    write(tmp_path / "q.jsonl", [star(7.0, "math", "geometry", "A", None) | {"image": picture}])
    (record,) = questions("mmstar", epath.Path(tmp_path)).records
    assert record.id == "7" and record.images[0].read().startswith(b"\x89PNG")
    assert record.prompt[0].content.endswith("from the given choices directly")


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
    told = capsys.readouterr().out
    assert "Accuracy" in told and "warning" not in told
    assert main([*command, "--rule", "reading=whole_word"]) == 0
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["metrics"]["Accuracy"] == 0.5 and report["options"] == {"reading": "whole_word"}
    write(tmp_path / "answers.jsonl", [{"id": 2, "response": "no"}])
    assert main(command) == 0
    assert "warning: 1 of 2 questions have an answer" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--benchmark", "nope"], "there is no benchmark 'nope', only amber, "),
        (["--rule", "reading=never"], "--rule reading=never: Input should be 'official' or"),
        (["--rule", "reading=["], "--rule reading=[: [ is no value"),
        (["--output", "{}/answers.jsonl"], "is the file of --responses; give another one"),
        (["--output", "{}"], " is a folder; name a file in it"),
        (["--responses", "{}/long.csv"], "long.csv, row 2: has more cells than the header"),
        (["--responses", "{}/latin.csv"], "latin.csv: is no table of text"),
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
    (tmp_path / "long.csv").write_text("id,response\n1,no,yes\n")
    (tmp_path / "latin.csv").write_bytes(b"id,response\n1,\xff\n")
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
