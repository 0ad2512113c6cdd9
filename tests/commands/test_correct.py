"""`mmpo correct` as a command: its rows, what it leaves out, and going on after it was killed."""

import json
import os

import pytest
import yaml
from helpers import meshes
from helpers.chat_server import ChatTestServer, question, reply
from helpers.score_rows import read_rows, write_rows

from mmpo_jax import cli
from mmpo_jax.correction import correctors, stage
from mmpo_jax.correction.codebook import SHIPPED
from mmpo_jax.data.readers import read_records
from mmpo_jax.objectives.terms import make_term
from mmpo_jax.picture_world.render import png_bytes
from mmpo_jax.picture_world.world import Scene, Thing, sample_scene
from mmpo_jax.recipes.training import NoReference
from mmpo_jax.training.row_use import LearnedUse

SCENE = Scene((Thing(0, 0, "star", "red"), Thing(1, 1, "ring", "blue")))
SHORT = ("Ann", "Bob"), ("3", "4"), ("a cat", "the cat."), ("red", "dark red"), ("yes", "no")


@pytest.fixture(autouse=True)
def surroundings(monkeypatch):
    monkeypatch.setattr(cli, "start_jax", lambda: None)
    mesh = meshes.one_device()
    monkeypatch.setattr("mmpo_jax.commands.correct.make_mesh", lambda **sizes: mesh)


@pytest.fixture
def pairs(tmp_path):
    """Pairs of short answers about images, two of which no rule corrects."""
    (tmp_path / "a.png").write_bytes(png_bytes(sample_scene("test", 0, 0), 48))
    rows = [
        {"id": f"{n}", "images": ["a.png"], "prompt": "Which?", "chosen": c, "rejected": r}
        for n, (c, r) in enumerate(SHORT)
    ]
    return write_rows(tmp_path / "pairs.jsonl", rows)


@pytest.fixture
def mmpo(capsys):
    """Runs the command; what it printed."""

    def mmpo(*words):
        status = cli.main(["correct", *map(str, words)])
        captured = capsys.readouterr()
        assert status == 0, captured.err
        return captured.out

    return mmpo


@pytest.fixture
def refused(capsys):
    """The message of a command that must fail."""

    def refused(*words):
        assert cli.main(["correct", *map(str, words)]) == 1
        err = capsys.readouterr().err
        assert "Traceback" not in err and err.count("mmpo correct: ") == 1
        return err

    return refused


def test_short_answers_by_rule(mmpo, pairs, tmp_path, caplog):
    caplog.set_level("INFO")
    out = tmp_path / "out.jsonl"
    assert mmpo(pairs, out) == f"corrected: {out}\n"
    rows = read_rows(out)
    assert [row["id"] for row in rows] == ["0", "1", "4"]
    assert {tuple(row["images"]) for row in rows} == {("a.png",)}
    for row in rows:
        chosen, rejected = row["responses"]
        answers = [turn["content"] for turn in chosen["turns"][2::2]]
        assert sorted(answers) == ["No", "Yes"]
        assert [chosen["rank"], rejected["rank"]] == [1, 2]
        assert row["extra"]["errors"][0]["wrong"] == rejected["turns"][0]["content"]
    left_out = {row["id"]: row["reason"] for row in read_rows(tmp_path / "out.rejected_rows.jsonl")}
    assert left_out == {"2": "same_responses", "3": "alike_answers"}
    assert "3 of 5 responses have corrections: answer 3" in caplog.text
    assert "2 have none: same_responses 1, alike_answers 1" in caplog.text
    assert not (tmp_path / "out.parts").exists()


def test_a_recipe_says_the_same(mmpo, pairs, tmp_path):
    mmpo(pairs, tmp_path / "out.jsonl", "--seed", "3", "--max-errors", "1")
    folder = tmp_path / "elsewhere"
    recipe = {
        "seed": 3,
        "output": str(folder),
        "data": {"source": "file", "path": str(pairs), "image_root": str(tmp_path)},
        "max_errors": 1,
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert mmpo(tmp_path / "recipe.yaml") == f"corrected: {folder / 'corrected.jsonl'}\n"
    ours, theirs = (
        read_records(path)[0] for path in (tmp_path / "out.jsonl", folder / "corrected.jsonl")
    )
    assert [record.responses for record in ours] == [record.responses for record in theirs]
    # The image lies outside of the folder, so there is a copy.
    assert [r.images[0].read() for r in ours] == [r.images[0].read() for r in theirs]
    assert os.listdir(folder / "corrected.images")
    mmpo(tmp_path / "recipe.yaml", pairs, tmp_path / "other.jsonl", "seed=4")
    assert read_rows(tmp_path / "other.jsonl") != read_rows(tmp_path / "out.jsonl")


@pytest.mark.parametrize("layout", ["dialogue", "apart"])
def test_captions_by_rule_are_what_nsft_learns_from(mmpo, tmp_path, tiny_processor, layout):
    (tmp_path / "a.png").write_bytes(png_bytes(SCENE, 24))
    right, wrong = (
        "there is a red star and a blue ring .",
        "there is a red star , a green ring and a yellow cross .",
    )
    row = {
        "id": "a",
        "images": ["a.png"],
        "prompt": "what is in the picture ?",
        "chosen": right,
        "rejected": wrong,
        "answer": SCENE.to_dict(),
    }
    data = write_rows(tmp_path / "pairs.jsonl", [row])
    mmpo(data, tmp_path / "out.jsonl", "--by", "rule", "--layout", layout)
    (record,), skipped = read_records(tmp_path / "out.jsonl", messages_as="dialogue")
    assert not skipped
    errors = read_rows(tmp_path / "out.jsonl")[0]["extra"]["errors"]
    assert [error["kind"] for error in errors] == ["attribute", "object"]
    use = LearnedUse.of([make_term("nsft")], NoReference())
    tokens = use.select(use.tokenize(record, tiny_processor, 100, 100))
    assert use.unfit(tokens) is None
    said = [
        tiny_processor.decode(response.ids[response.loss_mask].tolist())
        for response in tokens.responses
    ]
    learned = " ".join(said)
    assert right in learned and wrong not in learned
    assert (learned.count("yes"), learned.count("no")) == (2, 2)
    assert len(tokens.responses) == (1 if layout == "dialogue" else 5)


def test_nothing_to_correct(refused, tmp_path):
    row = {"prompt": "Which?", "chosen": "a cat", "rejected": "the cat"}
    data = write_rows(tmp_path / "pairs.jsonl", [row])
    message = refused(data, tmp_path / "out.jsonl")
    assert "no response could be corrected; " in message and "out.rejected_rows.jsonl" in message
    assert read_rows(tmp_path / "out.rejected_rows.jsonl")[0]["reason"] == "same_responses"


class TestRefusals:
    def test_rows_that_are_no_pairs(self, refused, tmp_path):
        rows = [{"id": str(n), "prompt": "Which?", "responses": ["a", "b"]} for n in range(3)]
        data = write_rows(tmp_path / "rows.jsonl", rows)
        message = refused(data, tmp_path / "out.jsonl")
        assert "3 of 3 rows cannot be used" in message and "incomplete_pair 3" in message
        assert not (tmp_path / "out.jsonl").exists()

    def test_a_codebook_with_a_mistake(self, refused, pairs, tmp_path):
        book = tmp_path / "book.yaml"
        with open(SHIPPED) as file:
            book.write_text(file.read().replace("level: image", "level: pixel"))
        message = refused(pairs, tmp_path / "out.jsonl", "--codebook", book)
        assert "book.yaml: this codebook cannot be used:" in message
        assert "errors.3.level: " in message

    @pytest.mark.parametrize(
        ("words", "told"),
        [
            (["--by", "chta"], "corrector: type: there is no 'chta'; did you mean chat?"),
            (["--by", "chat"], "corrector.url: Field required"),
            (["--by", "checkpoint"], "corrector.model: Field required"),
            (["--url", "http://a/v1"], "corrector.url: unknown key"),
            (["layot=apart"], "layot: unknown key; did you mean layout?"),
            (
                [*("--by", "chat", "--url", "http://a/v1", "--model", "m"), "corrector.prompt=hi"],
                "prompt: it has no {question}",
            ),
        ],
    )
    def test_options(self, refused, pairs, tmp_path, words, told):
        assert told in refused(pairs, tmp_path / "out.jsonl", *words)

    def test_one_word_is_a_recipe(self, refused, pairs):
        assert "pairs.jsonl" in refused(pairs)

    def test_the_data_as_the_output(self, refused, pairs):
        assert f"{pairs} is the data" in refused(pairs, pairs)


def errors_of(body, seen):
    """What a model says that works."""
    wrong = question(body).rpartition("Second answer: ")[2]
    error = {"kind": "object", "wrong": wrong, "yes": f"Not {wrong}?", "no": f"{wrong}?"}
    return reply(body, json.dumps({"errors": [error]}))


def chat(server):
    return ("--by", "chat", "--url", server.url, "--model", "judge")


class Killed(Exception):
    """What nothing expects."""


def test_a_run_that_was_killed_asks_nothing_twice(mmpo, pairs, tmp_path, monkeypatch):
    """Killed when the replies of the second of three parts are there, and the part is not."""
    with ChatTestServer(errors_of) as server:
        mmpo(pairs, tmp_path / "whole.jsonl", *chat(server))
    monkeypatch.setattr(stage, "CASES_PER_PART", 2)
    checks, check = [], correctors.check_failed

    def kill(*arguments):
        checks.append(arguments)
        if len(checks) == 2:
            raise Killed
        check(*arguments)

    monkeypatch.setattr(correctors, "check_failed", kill)
    with ChatTestServer(errors_of) as server:
        with pytest.raises(Killed):
            mmpo(pairs, tmp_path / "out.jsonl", *chat(server))
        before = len(server.bodies)
        assert 0 < before < 5 and not (tmp_path / "out.jsonl").exists()
        mmpo(pairs, tmp_path / "out.jsonl", *chat(server))
        assert len(server.bodies) == 5 == len(server.questions)
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert not (tmp_path / "out.parts").exists()


def test_what_a_model_does_not_say_is_left_out_with_its_reply(mmpo, pairs, tmp_path):
    def says(body, seen):
        told = question(body).rpartition("Second answer: ")[2]
        return reply(body, "I like cats.") if told == "4" else errors_of(body, seen)

    with ChatTestServer(says) as server:
        mmpo(pairs, tmp_path / "out.jsonl", *chat(server), "corrector.attempts=2")
        asked = [count for text, count in server.questions.items() if text.endswith("answer: 4")]
    assert asked == [2]
    assert [row["id"] for row in read_rows(tmp_path / "out.jsonl")] == ["0", "2", "3", "4"]
    (row,) = read_rows(tmp_path / "out.rejected_rows.jsonl")
    assert (row["id"], row["reason"]) == ("1", "not_corrected")
    assert row["detail"].startswith("no_json: ")
    assert row["detail"].endswith("; the last reply: I like cats.")


def test_too_many_failures_stop_and_are_asked_again(refused, mmpo, pairs, tmp_path):
    """What was answered stays."""
    with ChatTestServer(lambda body, seen: reply(body, "hm")) as server:
        message = refused(pairs, tmp_path / "out.jsonl", *chat(server), "corrector.attempts=1")
        assert "5 of 5 responses failed (no_json 5), and corrector.max_failed allows 0.1" in message
        assert not (tmp_path / "out.jsonl").exists()
        server.script = errors_of
        mmpo(pairs, tmp_path / "out.jsonl", *chat(server), "corrector.attempts=1")
    assert len(read_rows(tmp_path / "out.jsonl")) == 5


@pytest.mark.slow
def test_a_checkpoint_is_asked_too(refused, pairs, tiny_folder, tmp_path):
    """Its weights are random, so nobody can read what it says."""
    book = tmp_path / "book.yaml"
    book.write_text("errors: [{name: object, level: instance, meaning: a star}]")
    message = refused(
        *(pairs, tmp_path / "out.jsonl", "--by", "checkpoint", "--model", tiny_folder),
        *("--codebook", book),
        "corrector.prompt='{codebook} {max_errors} {question} {chosen} {rejected}'",
        *("corrector.max_new_tokens=4", "corrector.attempts=1", "corrector.max_failed=1"),
    )
    assert "no response could be corrected" in message
    rows = read_rows(tmp_path / "out.rejected_rows.jsonl")
    assert [row["reason"] for row in rows] == ["not_corrected"] * 5
    assert all(row["detail"].startswith(("unfinished: ", "no_json: ")) for row in rows)
