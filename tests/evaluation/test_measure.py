"""A model measured by benchmarks: answers that stay, and the same scores both ways."""

import json

import pytest
from helpers import meshes
from helpers.benchmarks import assert_rows_add_up, write
from helpers.chat_server import ChatTestServer, reply

from mmpo_jax.benchmarks.benchmark import PICTURE
from mmpo_jax.benchmarks.judging import FILE, Judge
from mmpo_jax.benchmarks.score_files import score_answers
from mmpo_jax.checkpoints.checkpoint import load_checkpoint
from mmpo_jax.cli import main
from mmpo_jax.core.errors import MmpoError
from mmpo_jax.evaluation.answers import Measuring
from mmpo_jax.evaluation.measure import all_values, measure, read_measured, shown_metrics
from mmpo_jax.generation import responses
from mmpo_jax.picture_world.pope import write_questions
from mmpo_jax.recipes.command_recipes import EvaluateRecipe

WORLD = {"type": "picture_world", "size": 5, "questions": 2, "image_size": 24, "seeds": (0, 1)}


@pytest.fixture(scope="module")
def model(tiny_folder):
    mesh = meshes.one_device()
    return load_checkpoint(str(tiny_folder), mesh), mesh


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    """POPE's files about three scenes."""
    folder = tmp_path_factory.mktemp("pope")
    return write_questions(str(folder), size=3, image_size=24)


def sections(*given):
    recipe = {"output": "out", "model": "m", "evaluation": list(given)}
    return EvaluateRecipe.model_validate(recipe).evaluation


def pope(questions, **options):
    files = {"data": questions[0], "images": questions[0].rpartition("/")[0] + "/images"}
    return {"type": "pope", "max_new_tokens": 2} | files | options


def rows_of(path):
    with open(path) as lines:
        return [json.loads(line) for line in lines]


@pytest.mark.slow
def test_the_same_scores_as_for_anybodys_answers(model, questions, tmp_path):
    checkpoint, mesh = model
    asked = pope(questions, name="asked", reading="whole_word")
    given = sections(WORLD | {"max_new_tokens": 4}, asked)
    at = Measuring(checkpoint, mesh, str(tmp_path / "run"))
    measured = measure(given, at)
    assert [one.name for one in measured] == ["picture_world", "asked"]
    out = str(tmp_path / "out.json")
    for one, section in zip(measured, given, strict=True):
        path = str(tmp_path / "run" / f"{one.name}.answers.jsonl")
        options = section.options(section.benchmark.options)
        data = getattr(section, "data", None)
        again = score_answers(one.benchmark.name, data, path, out, options)
        theirs = json.loads((tmp_path / "out.json").read_text())
        ours = json.loads((tmp_path / "run" / f"{one.name}.scores.json").read_text())
        # Whoever asks knows besides which questions are about the same picture.
        assert all(PICTURE in row for row in ours["rows"])
        ours["rows"] = [{k: v for k, v in row.items() if k != PICTURE} for row in ours["rows"]]
        assert {key: ours[key] for key in theirs} == theirs
        assert again.metrics.keys() == one.scores.metrics.keys()
        assert_rows_add_up(one.benchmark.name, one.scores)
    world, asked = measured
    assert len(world.scores.rows) == 5 and world.scores.beside["answers"] == 5 * (2 + 1 + 2)
    assert asked.scores.beside["questions"] == len(asked.scores.rows)
    values = all_values(measured)
    assert {one.key for one in shown_metrics(given)} <= values.keys()
    read = read_measured(given, str(tmp_path / "run"))
    assert [one.scores.rows for one in read] == [one.scores.rows for one in measured]


def test_nothing_is_asked_or_scored_again(model, questions, tmp_path, monkeypatch):
    checkpoint, mesh = model
    at = Measuring(checkpoint, mesh, str(tmp_path))
    given = sections(pope(questions))
    first = measure(given, at)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    asked = []
    monkeypatch.setattr(
        "mmpo_jax.generation.responses.generate_responses", lambda *a, **k: asked.append(1)
    )
    assert measure(given, at)[0].scores.rows == first[0].scores.rows and not asked
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    # Another label of a question that was answered: scored anew, and nobody is asked.
    path = tmp_path / "relabelled.json"
    rows = rows_of(questions[0])
    rows[0]["label"] = "no" if rows[0]["label"] == "yes" else "yes"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    other = measure(sections(pope([str(path)]) | {"images": pope(questions)["images"]}), at)
    assert not asked and other[0].scores.metrics != first[0].scores.metrics


def test_a_killed_run_goes_on(model, questions, tmp_path, monkeypatch):
    """Stopped in the third part, it asks what is left, and ends the same."""
    checkpoint, mesh = model
    monkeypatch.setattr("mmpo_jax.generation.responses.PROMPTS_PER_PART", 4)
    given = sections(pope(questions))
    whole = measure(given, Measuring(checkpoint, mesh, str(tmp_path / "whole")))
    parts = []

    class Killed(BaseException):
        pass

    def counted(*args, **options):
        if len(parts) == 2:
            raise Killed
        parts.append(len(args[1]))
        return original(*args, **options)

    original = responses.generate_responses
    at = Measuring(checkpoint, mesh, str(tmp_path / "killed"))
    with monkeypatch.context() as patch:
        patch.setattr(responses, "generate_responses", counted)
        with pytest.raises(Killed):
            measure(given, at)
    asked = []
    monkeypatch.setattr(
        responses,
        "generate_responses",
        lambda *args, **options: asked.append(len(args[1])) or original(*args, **options),
    )
    assert measure(given, at)[0].scores.rows == whole[0].scores.rows
    assert parts == [4, 4] and sum(asked) == len(whole[0].scores.rows) - 8
    names = [path.name for path in sorted((tmp_path / "whole").iterdir()) if path.suffix != ".json"]
    for name in names:
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_answers_are_judged_once(model, questions, tmp_path):
    """Two sets of one benchmark, of which one has a judge."""
    checkpoint, mesh = model
    asked = rows_of(questions[0])[:2]
    for folder, category in (("vlguard_unsafes", "x"), ("safety_multimodal_jailbreaking", "y")):
        (tmp_path / "data" / folder).mkdir(parents=True)
        rows = [
            {"id": place, "question": row["text"], "image": row["image"], "answer": "Yes"}
            | {"label": "do harm", "category": category}
            for place, row in enumerate(asked)
        ]
        write(tmp_path / "data" / folder / "train.jsonl", rows)
    at = Measuring(checkpoint, mesh, str(tmp_path / "run"))
    section = {"type": "mm_rlhf_safetybench", "data": str(tmp_path / "data"), "max_new_tokens": 2}
    section["images"] = pope(questions)["images"]
    with ChatTestServer(lambda body, seen: reply(body, "Yes", model="judge-2")) as server:
        given = sections(section | {"judge": {"url": server.url, "model": "judge"}})
        (first,) = measure(given, at)
        asked_before = len(server.bodies)
    (again,) = measure(given, at)
    assert again.scores.rows == first.scores.rows and 0 < asked_before <= 2
    assert first.scores.metrics["Multimodel_ASR"] == 1
    assert {row["id"] for row in first.scores.rows} == {
        *("unsafes/0", "unsafes/1", "multimodel/0", "multimodel/1")
    }
    kept = Judge(given=str(tmp_path / "run" / "mm_rlhf_safetybench.judge" / FILE))
    answers = str(tmp_path / "run" / "mm_rlhf_safetybench.answers.jsonl")
    out = str(tmp_path / "out.json")
    theirs = score_answers("mm_rlhf_safetybench", section["data"], answers, out, {}, kept)
    assert theirs.rows == first.scores.rows
    assert {one.key for one in shown_metrics(given)} <= all_values([first]).keys()


def test_all_questions_are_read_before_a_model_is_loaded(questions, tmp_path, capsys):
    missing = pope(questions, name="missing") | {"data": str(tmp_path / "nowhere.json")}
    recipe = {"output": str(tmp_path / "run"), "model": "builtin:picture_world"}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe | {"evaluation": [WORLD, missing]}))
    assert main(["evaluate", str(tmp_path / "recipe.yaml")]) == 1
    assert "nowhere.json: there is no such folder" in capsys.readouterr().err
    assert not (tmp_path / "run" / "picture_world.answers.jsonl").exists()


def test_questions_that_cannot_be_asked(model, questions, tmp_path):
    checkpoint, mesh = model
    at = Measuring(checkpoint, mesh, str(tmp_path))
    (tmp_path / "images").mkdir()
    for row in rows_of(questions[0]):
        (tmp_path / "images" / row["image"]).write_bytes(b"no picture")
    broken = pope(questions) | {"images": str(tmp_path / "images")}
    with pytest.raises(MmpoError, match=r"pope: question '1': .*; and \d+ other questions"):
        measure(sections(broken), at)
    with pytest.raises(MmpoError, match=r"nowhere: there is no such folder; .* COCO val2014"):
        measure(sections(pope(questions) | {"images": str(tmp_path / "nowhere")}), at)
