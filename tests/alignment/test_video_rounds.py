"""Two rounds about videos: files and lists of frames are sampled from, labelled and trained on."""

import json
import math

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("av")
from helpers import clips, pictures
from helpers.kinds import KINDS, make_checkpoint
from helpers.meshes import one_device
from PIL import Image

from mmpo_jax.alignment import align
from mmpo_jax.alignment.align import run_alignment
from mmpo_jax.checkpoints.checkpoint import load_checkpoint
from mmpo_jax.core import progress
from mmpo_jax.core.files import read_table
from mmpo_jax.feedback.labeler import CheckpointLabeler
from mmpo_jax.recipes.align_recipe import AlignRecipe
from mmpo_jax.recipes.data import FileData
from mmpo_jax.reporting.page import write_report
from mmpo_jax.training.metrics import read_metrics

pytestmark = pytest.mark.slow

PROMPTS, SAMPLES, ROUNDS = 5, 3, 2


@pytest.fixture(scope="module", autouse=True)
def on_one_device():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(align, "make_mesh", lambda **sizes: one_device())
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("qwen") / "model", KINDS["qwen3_vl"]).folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """In each round three video files, a list of frames and an image."""
    folder = tmp_path_factory.mktemp("data")
    rows = []
    for number in range(ROUNDS * PROMPTS):
        row = {"id": f"{number}", "prompt": "What happens here?"}
        kind = number % PROMPTS
        if kind < 3:
            name = f"{number}.{'webm' if kind == 1 else 'mp4'}"
            made = clips.encode(8 + 2 * number, 4, (56, 84), name.partition(".")[2])
            (folder / name).write_bytes(made)
            row["videos"] = [name]
        elif kind == 3:
            names = [f"{number}-{at}.png" for at in range(4)]
            for at, name in enumerate(names):
                Image.new("RGB", (84, 56), (60 * at, 20 * number, 0)).save(folder / name)
            row["videos"] = [{"frames": names, "fps": 2.0}]
        else:
            (folder / f"{number}.png").write_bytes(pictures.encode(pictures.noise("L", 70, 90)))
            row["images"] = [f"{number}.png"]
        rows.append(row)
    file = folder / "prompts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def recipe(output, model, data):
    return AlignRecipe.model_validate(
        {
            "output": str(output),
            "model": str(model),
            "data": {"source": "file", "path": str(data)},
            "rounds": ROUNDS,
            "prompts_per_round": PROMPTS,
            "lengths": {"prompt": [192], "response": [64]},
            "sampling": {"num_samples": SAMPLES, "max_new_tokens": 6, "batch_size": PROMPTS},
            "feedback": {"splitter": {"type": "whole"}, "score": "log_odds", "max_failed": 0.3},
            "pairing": {"length_balance": "none", "min_difference": 1e-6},
            "training": {
                "optimizer": {"learning_rate": 1e-3},
                "batch_size": 2,
                "max_steps": 2,
                "log_every": 1,
                "save_every": 1,
            },
        }
    )


@pytest.fixture(scope="module")
def finished(model, data, tmp_path_factory):
    """(output folder, its reports)."""
    output = tmp_path_factory.mktemp("align") / "run"
    return output, run_alignment(recipe(output, model, data))


def files(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.suffix in (".parquet", ".safetensors")
    }


def test_all_prompts_are_judged_and_trained_on(finished):
    output, reports = finished
    for report in reports[1:]:
        assert (report.prompts, report.responses) == (PROMPTS, PROMPTS * SAMPLES)
        folder = output / f"round-{report.index}"
        judged = read_table(folder / "judge.parquet").to_pylist()
        assert len({row["score"] for row in judged if row["reason"] is None}) > PROMPTS
        paired = set(read_table(folder / "pairs.parquet")["prompt_id"].to_pylist())
        assert len(paired) == PROMPTS
        steps = read_metrics(folder / "train" / "metrics.jsonl")
        assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
        assert all(math.isfinite(row["grad_norm"]) and row["grad_norm"] > 0 for row in steps)


def test_the_labeler_is_shown_the_videos(finished, model, data):
    """Its probabilities are those of the start model asked about a prompt's video, and others than
    without it."""
    source = FileData(source="file", path=str(data))
    records = {record.id: record for record in source.load(supervised=False).records}
    rows = read_table(finished[0] / "round-1" / "conquer.parquet").to_pylist()
    suffix = recipe("", model, data).feedback.suffix
    checkpoint = load_checkpoint(str(model), one_device())
    labeler = CheckpointLabeler(checkpoint, one_device(), None, batch_size=2)
    for name in ("0", "1", "3"):
        asked = [row for row in rows if row["prompt_id"] == name]
        questions = tuple(row["question"] + suffix for row in asked)
        seen, blind = labeler.answer(
            [(name, records[name].media, questions), ("blind", (), questions)]
        )
        given = np.array([(row["p_yes"], row["p_no"]) for row in asked])
        assert len(given) and records[name].videos
        np.testing.assert_allclose(given, [answer[:2] for answer in seen], rtol=1e-4)
        assert not np.allclose(given, [answer[:2] for answer in blind], rtol=1e-2)


def test_reports_show_a_frame_and_name_the_file(finished, tmp_path):
    rows = read_table(finished[0] / "round-1" / "prompts.parquet").to_pylist()
    assert [len(row["thumbnails"]) for row in rows] == [1] * PROMPTS
    assert all(picture for row in rows for picture in row["thumbnails"])
    assert [row["images"] for row in rows[:3]] == [["0.mp4"], ["1.webm"], ["2.mp4"]]
    told = (finished[0] / "round-1" / "examples.txt").read_text()
    assert "== 0 (0.mp4)" in told and "== 3 (video 1 (from 3-0.png on))" in told
    write_report([str(finished[0])], str(tmp_path / "report.html"))
    assert (tmp_path / "report.html").read_bytes() == (finished[0] / "report.html").read_bytes()


class Stop(BaseException):
    """A kill: nothing catches it."""


def test_stopped_between_stages_it_goes_on(finished, model, data, tmp_path, monkeypatch):
    done = []

    def stop_once():
        doing = [activity.name for activity in progress._activities]
        if not done and "round 2/2" in doing and "conquer" in doing:
            done.append(doing)
            raise Stop

    monkeypatch.setattr(progress, "tell", stop_once)
    output = tmp_path / "run"
    with pytest.raises(Stop):
        run_alignment(recipe(output, model, data))
    assert (output / "round-2" / "divide.parquet").exists()
    assert not (output / "round-2" / "conquer.parquet").exists()
    assert run_alignment(recipe(output, model, data)) == finished[1]
    assert files(output) == files(finished[0])
