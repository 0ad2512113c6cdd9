"""The command line: one clear message and exit status 1 for whatever a person can mend."""

import json
import signal
import time

import jax
import pytest
from helpers.cli_recipes import POSSIBLE, recipe, write_rows

from mmpo_jax import cli, flags
from mmpo_jax.commands import generate
from mmpo_jax.core import files
from mmpo_jax.parallel.mesh import make_mesh
from mmpo_jax.picture_world.render import png_bytes
from mmpo_jax.picture_world.world import sample_scene

START_JAX = cli.start_jax


def skipped_reasons(folder):
    rows = [json.loads(line) for line in (folder / "rejected_rows.jsonl").read_text().splitlines()]
    assert all(row["file"].endswith("rows.jsonl") and row["detail"] for row in rows)
    return {row["id"]: row["reason"] for row in rows}


@pytest.mark.parametrize("command", sorted(flags.RECIPES))
def test_a_misspelt_key_before_anything_starts(command, refused, tmp_path, monkeypatch):
    def start():
        raise AssertionError("JAX is started before the recipe is checked")

    monkeypatch.setattr(cli, "start_jax", start)
    message = refused(
        command, recipe(tmp_path, "builtin:picture_world"), "attenton=a", "devices.tensr=1"
    )
    assert "attenton: unknown key; did you mean attention?" in message
    assert "devices.tensr: unknown key; did you mean tensor?" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("backend", "devices"), [("cpu", 1), ("cpu", 8), ("tpu", 8)])
def test_where_compiled_programs_are_kept(backend, devices, monkeypatch):
    set_to = {}
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    monkeypatch.setattr(jax.config, "update", set_to.__setitem__)
    START_JAX()
    if (backend, devices) == ("cpu", 8):  # not in a folder that the environment names, either
        assert set_to == {"jax_enable_compilation_cache": False}
    else:
        assert "jax_compilation_cache_dir" in set_to


def test_no_recipe(capsys, tmp_path):
    assert cli.main(["train", str(tmp_path / "none.yaml")]) == 1
    assert "none.yaml: No such file or directory" in capsys.readouterr().err


def test_devices_that_are_not_there(generation, mmpo, monkeypatch):
    monkeypatch.setattr("mmpo_jax.commands.generate.make_mesh", make_mesh)
    status, _, err = mmpo("generate", generation, "devices.fsdp=3")
    assert status == 1
    told = "mesh {'data': 1, 'fsdp': 3, 'tensor': 1} does not fit 8 devices; with the others as "
    assert f"{told}they are, fsdp 8 would" in err


@pytest.mark.parametrize("arguments", [[], ["destroy", "a.yaml"], ["train"]])
def test_usage(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    assert "usage: mmpo" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["train", "generate", "evaluate", "align"])
@pytest.mark.parametrize(
    ("model", "told"),
    [
        ("/nowhere/llava", "/nowhere/llava: there is no such checkpoint folder"),
        ("builtin:circles", "builtin:circles: unknown; built in are builtin:picture_world"),
    ],
)
def test_no_model(command, model, told, refused, tmp_path):
    values = recipe(tmp_path, model, **POSSIBLE[command])
    if command == "evaluate":
        del values["data"]
    assert told in refused(command, values)


def test_other_errors_are_not_swallowed(generation, mmpo, monkeypatch):
    """A defect of the library keeps its traceback."""
    monkeypatch.setattr(generate, "main", lambda recipe: {}["no such key"])
    with pytest.raises(KeyError):
        mmpo("generate", generation)


BAD_ROWS = {
    "truncated": "image_broken",
    "no-bytes": "image_broken",
    "outside": "image_outside_folder",
    "missing": "image_missing",
    "empty-prompt": "no_prompt",
    "too-long": "prompt_too_long",
}


class TestGenerate:
    """Good and bad rows of a JSONL file beside each other."""

    @pytest.fixture
    def rows(self, tmp_path):
        (tmp_path / "secret.png").write_bytes(png_bytes(sample_scene("test", 0, 9)))
        folder = tmp_path / "data"
        folder.mkdir()
        for number in range(2):
            (folder / f"{number}.png").write_bytes(png_bytes(sample_scene("test", 0, number)))
        (folder / "truncated.png").write_bytes((folder / "0.png").read_bytes()[:90])
        (folder / "no-bytes.png").write_bytes(b"")
        ask = "what is in the picture ?"
        pair = {"chosen": "a ring", "rejected": "a star"}
        rows = [
            {"id": "first", "image": "0.png", "prompt": ask},
            {"id": "truncated", "image": "truncated.png", "prompt": ask},
            {"id": "no-bytes", "image": "no-bytes.png", "prompt": ask},
            {"id": "outside", "image": "../secret.png", "prompt": ask},
            {"id": "missing", "image": "7.png", "prompt": ask},
            {"id": "empty-prompt", **pair},
            {"id": "too-long", "image": "0.png", "prompt": "red " * 30},
            {"id": "second", "image": "1.png", "prompt": "describe the picture .", **pair},
            {"id": "text", "prompt": ask, **pair, "rejected": " "},  # which is not read
        ]
        return folder, rows

    def run(self, mmpo, generation, rows, limit):
        folder, values = rows
        data = {"source": "file", "path": write_rows(folder, values), "max_skipped": limit}
        return mmpo("generate", generation | {"data": data})

    def test_good_rows_are_answered_and_bad_ones_counted(self, mmpo, generation, rows, tmp_path):
        status, out, err = self.run(mmpo, generation, rows, 0.7)
        assert status == 0, err
        written = tmp_path / "out" / "responses.jsonl"
        assert f"responses: {written}" in out
        answers = [json.loads(line) for line in written.read_text().splitlines()]
        pictures = [rows[0] / "0.png", rows[0] / "1.png"]
        copies = [f"responses.images/{files.fingerprint_file(file)}.png" for file in pictures]
        assert [(row["id"], row.get("images"), row["prompt"]) for row in answers] == [
            ("first", [copies[0]], "what is in the picture ?"),
            ("second", [copies[1]], "describe the picture ."),
            ("text", None, "what is in the picture ?"),
        ]
        assert all(len(row["responses"]) == 2 for row in answers)
        assert skipped_reasons(tmp_path / "out") == BAD_ROWS

    def test_too_many_bad_rows_stop_the_run(self, mmpo, generation, rows, tmp_path):
        status, _, err = self.run(mmpo, generation, rows, 0.5)
        assert status == 1
        assert "6 of 9 rows cannot be used, more than the allowed 50.0%" in err
        assert "image_broken 2" in err
        assert not (tmp_path / "out" / "responses.jsonl").exists()
        assert skipped_reasons(tmp_path / "out") == BAD_ROWS

    def test_a_row_is_answered_the_same_without_its_neighbours(
        self, mmpo, generation, rows, tmp_path
    ):
        assert self.run(mmpo, generation, rows, 0.7)[0] == 0
        written = tmp_path / "out" / "responses.jsonl"
        among_others = written.read_text().splitlines()
        folder, values = rows
        assert self.run(mmpo, generation, (folder, values[-2:-1]), 0)[0] == 0
        assert written.read_text().splitlines() == among_others[1:2]


@pytest.mark.slow
def test_train_and_evaluate(mmpo, tiny_folder, tmp_path):
    """The commands end with what they made."""
    values = recipe(tmp_path, tiny_folder) | {
        "training": {"objective": {"type": "sft"}, "max_steps": 1, "batch_size": 8}
    }
    values["data"] = {"source": "picture_world", "size": 4, "image_size": 24, "questions": 2}
    status, out, err = mmpo("train", values, "lengths.response=[32]")
    assert status == 0, err
    model = tmp_path / "out" / "model"
    assert out.splitlines()[-1] == f"model: {model}"
    values = recipe(tmp_path, tmp_path / "out")  # the run's folder: its last checkpoint
    del values["data"]
    evaluation = {"type": "picture_world", "size": 3, "questions": 2, "image_size": 24}
    evaluation |= {"max_new_tokens": 4, "batch_size": 8}
    status, out, err = mmpo("evaluate", values | {"evaluation": evaluation})
    assert status == 0, err
    metrics = {"sampled/chair_s", "greedy/recall", "yes_no_accuracy"}
    assert metrics <= {line.split()[0] for line in out.splitlines() if line}
    saved = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert saved["model"] == str(tmp_path / "out")
    assert {f"picture_world/{name}" for name in metrics} <= saved["metrics"].keys()


def test_ctrl_c_is_no_traceback(generation, mmpo, monkeypatch):
    def interrupted(recipe):
        raise KeyboardInterrupt

    monkeypatch.setattr(generate, "main", interrupted)
    status, _, told = mmpo("generate", generation)
    assert status == 130
    assert told == "mmpo generate: stopped; the same command goes on from what is finished\n"


def test_sigterm_is_no_failure(generation, mmpo, monkeypatch):
    def told(recipe):
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(generate, "main", told)
    before = signal.getsignal(signal.SIGTERM)
    status, _, said = mmpo("generate", generation)
    assert status == 0 and signal.getsignal(signal.SIGTERM) == before
    assert said == (
        "mmpo generate: was told to end; the same command goes on from what is finished\n"
    )


def test_objectives_by_name(capsys):
    assert cli.main(["objectives", "mdpo"]) == 0
    assert "\nmdpo\n  mDPO: " in capsys.readouterr().out
    assert cli.main(["objectives", "dppo"]) == 1
    assert "there is no objective or reward 'dppo'; did you mean dpo" in capsys.readouterr().err
    assert cli.main(["objectives", "rloo"]) == 1
    assert "'rloo'; write `training: {objective: {type: grpo, ratio" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("number", "expected"), [(signal.SIGINT, cli.INTERRUPTED), (signal.SIGTERM, 0)]
)
def test_a_signal_that_python_ignores_comes_again(generation, mmpo, monkeypatch, number, expected):
    """Where an object ends, as in a callback of the garbage collector, nothing can be raised."""

    class Odd:
        def __del__(self):
            signal.raise_signal(number)

    def main(recipe):
        Odd()
        time.sleep(20)

    monkeypatch.setattr(generate, "main", main)
    # A shell's background jobs begin with Ctrl-C ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        status, _, told = mmpo("generate", generation)
    finally:
        signal.signal(signal.SIGINT, before)
    assert status == expected and "goes on from what is finished" in told
