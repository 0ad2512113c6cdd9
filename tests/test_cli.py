"""The command line: one clear message and exit status 1 for whatever a person can mend."""

import errno
import json
import shutil
from pathlib import Path

import jax
import pytest
import tiny
import yaml
from jax.sharding import AxisType

from mmpo_jax import cli, files
from mmpo_jax.parallel.mesh import AXES, make_mesh
from mmpo_jax.shapes.render import png_bytes
from mmpo_jax.shapes.world import sample_scene

START_JAX = cli._start_jax
MESH_USERS = ("alignment.align", "evaluation.run", "generation.run", "scoring.run", "training.run")


@pytest.fixture(autouse=True)
def surroundings(monkeypatch):
    """One device, which is faster; and `_start_jax` would move the tests' compilation cache."""
    monkeypatch.setattr(cli, "_start_jax", lambda: None)
    mesh = jax.make_mesh(
        (1, 1, 1), AXES, axis_types=(AxisType.Auto,) * 3, devices=jax.devices()[:1]
    )
    for module in MESH_USERS:
        monkeypatch.setattr(f"mmpo_jax.{module}.make_mesh", lambda **sizes: mesh)


@pytest.fixture
def mmpo(tmp_path, capsys):
    """Runs a subcommand on a recipe given as a dict; returns (status, stdout, stderr)."""

    def mmpo(command, recipe, *overrides):
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe))
        status = cli.main([command, str(path), *overrides])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return mmpo


@pytest.fixture
def refused(mmpo):
    """The one message of a command that must fail."""

    def refused(command, recipe, *overrides):
        status, _, err = mmpo(command, recipe, *overrides)
        assert status == 1
        assert "Traceback" not in err
        assert err.count(f"mmpo {command}: ") == 1
        return err[err.index(f"mmpo {command}: ") :]

    return refused


def recipe(tmp_path, model, **changes):
    return {
        "output": str(tmp_path / "out"),
        "model": str(model),
        "lengths": {"prompt": [24], "response": [16]},
        "data": {"source": "shapes", "size": 3, "image_size": 24},
        **changes,
    }


POSSIBLE = {
    "train": {"training": {"objective": {"type": "sft"}}},
    "align": {"sampling": {"max_new_tokens": 4}},
    "generate": {},
    "score": {},
    "evaluate": {},
}
"""What a command needs beside the keys above: their defaults do not go together."""


@pytest.fixture
def generation(tmp_path, tiny_folder):
    return recipe(
        tmp_path,
        tiny_folder,
        sampling={"num_samples": 2, "max_new_tokens": 4, "batch_size": 8},
    )


@pytest.fixture
def copy(tiny_folder, tmp_path):
    return shutil.copytree(tiny_folder, tmp_path / "model")


def edit_json(path, **changes):
    values = json.loads(path.read_text())
    for dotted, value in changes.items():
        *parents, name = dotted.split("__")
        node = values
        for parent in parents:
            node = node[parent]
        node[name] = value
    path.write_text(json.dumps(values))


def write_rows(folder, rows):
    """A JSONL file; strings are taken as lines."""
    path = folder / "rows.jsonl"
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.write_text("".join(line + "\n" for line in lines))
    return str(path)


def skipped_reasons(folder):
    rows = [json.loads(line) for line in (folder / "rejected_rows.jsonl").read_text().splitlines()]
    assert all(row["file"].endswith("rows.jsonl") and row["detail"] for row in rows)
    return {row["id"]: row["reason"] for row in rows}


@pytest.mark.parametrize("command", sorted(cli.COMMANDS))
def test_a_misspelt_key_before_anything_starts(command, refused, tmp_path, monkeypatch):
    def start():
        raise AssertionError("JAX is started before the recipe is checked")

    monkeypatch.setattr(cli, "_start_jax", start)
    message = refused(command, recipe(tmp_path, "builtin:shapes"), "sead=3", "lengths.promt=[3]")
    assert "sead: unknown key; did you mean seed?" in message
    assert "lengths.promt: unknown key; did you mean prompt?" in message
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
    monkeypatch.setattr("mmpo_jax.generation.run.make_mesh", make_mesh)
    status, _, err = mmpo("generate", generation, "devices.fsdp=3")
    assert status == 1
    assert "mesh {'data': 1, 'fsdp': 3, 'tensor': 1} does not fit 8 devices" in err


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
        ("builtin:circles", "builtin:circles: unknown; built in are builtin:shapes"),
    ],
)
def test_no_model(command, model, told, refused, tmp_path):
    values = recipe(tmp_path, model, **POSSIBLE[command])
    if command == "evaluate":
        del values["data"]
    assert told in refused(command, values)


class TestBrokenModels:
    def test_a_folder_without_a_model(self, refused, tmp_path):
        (tmp_path / "empty").mkdir()
        message = refused("generate", recipe(tmp_path, tmp_path / "empty"))
        assert "config.json: not found" in message

    def test_weights_of_other_shapes(self, copy, refused, tmp_path):
        edit_json(copy / "config.json", text_config__intermediate_size=64)
        message = refused("generate", recipe(tmp_path, copy))
        assert "model.safetensors: language_model.model.layers.0.mlp." in message
        assert "has shape" in message
        assert "the config gives" in message

    def test_more_layers_than_weights(self, copy, refused, tmp_path):
        edit_json(copy / "config.json", text_config__num_hidden_layers=3)
        assert "no layer 2; the config has 3 layers" in refused("generate", recipe(tmp_path, copy))

    def test_another_architecture(self, copy, refused, tmp_path):
        edit_json(copy / "config.json", text_config__model_type="gemma")
        values = recipe(tmp_path, copy, **POSSIBLE["train"])
        assert "text_config.model_type is 'gemma'" in refused("train", values)

    def test_a_tokenizer_with_more_words_than_the_model(self, copy, refused, tmp_path):
        tokenizer = json.loads((copy / "tokenizer.json").read_text())
        words = tokenizer["model"]["vocab"]
        words |= {f"word-{i}": len(words) + i for i in range(20)}
        (copy / "tokenizer.json").write_text(json.dumps(tokenizer))
        message = refused("generate", recipe(tmp_path, copy))
        assert f"the tokenizer has {len(words)} ids" in message
        assert f"the model's vocabulary only {tiny.VOCAB_SIZE}" in message

    def test_truncated_weights(self, copy, refused, tmp_path):
        weights = copy / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1000])
        message = refused("generate", recipe(tmp_path, copy))
        assert "model.safetensors: not a readable safetensors file" in message

    def test_a_broken_tokenizer(self, copy, refused, tmp_path):
        (copy / "tokenizer.json").write_text("{")
        assert "cannot load the tokenizer" in refused("generate", recipe(tmp_path, copy))


class TestBadData:
    @pytest.mark.parametrize("command", ["train", "generate", "align"])
    def test_no_file(self, command, tiny_folder, refused, tmp_path):
        data = {"source": "file", "path": str(tmp_path / "rows.jsonl")}
        values = recipe(tmp_path, tiny_folder, **POSSIBLE[command] | {"data": data})
        message = refused(command, values)
        assert "rows.jsonl: No such file or directory" in message

    @pytest.mark.parametrize("limit", [0.1, 1.0])
    @pytest.mark.parametrize("command", ["train", "generate"])
    def test_all_rows_bad(self, command, limit, tiny_folder, refused, tmp_path):
        path = write_rows(tmp_path, ["{", '"text"', {"id": "c", "prompt": "", "chosen": "a"}])
        data = {"source": "file", "path": path, "max_skipped": limit}
        message = refused(command, recipe(tmp_path, tiny_folder, data=data))
        if limit < 1:
            assert "3 of 3 rows cannot be used, more than the allowed 10.0%" in message
            assert "bad_json 2, incomplete_pair 1" in message
        else:
            assert "rows.jsonl: no row that can be used" in message
        assert len((tmp_path / "out" / "rejected_rows.jsonl").read_text().splitlines()) == 3

    def test_prompts_do_not_fit_the_evaluation(self, tiny_folder, refused, tmp_path):
        values = recipe(tmp_path, tiny_folder, lengths={"prompt": [8], "response": [16]})
        del values["data"]
        message = refused("evaluate", values, "evaluation.data={source: shapes, size: 2}")
        assert "give lengths.prompt a larger size" in message

    def test_pairs_without_a_common_prompt(self, generation, refused, tmp_path):
        """Two whole dialogues are something to learn from, but nothing to answer."""

        def dialogue(question):
            return [
                {"role": "user", "content": question},
                {"role": "assistant", "content": "yes"},
            ]

        path = write_rows(tmp_path, [{"chosen": dialogue("a ?"), "rejected": dialogue("red ?")}])
        message = refused("generate", generation | {"data": {"source": "file", "path": path}})
        assert "no_prompt 1" in message


class TestOutput:
    @pytest.mark.parametrize("command", ["generate", "score"])
    def test_the_data_are_not_replaced(self, refused, tiny_folder, tmp_path, command):
        path = write_rows(tmp_path, [{"prompt": "a ?", "chosen": "yes", "rejected": "no"}])
        before = Path(path).read_text()
        data = {"source": "file", "path": path}
        values = {"model": str(tiny_folder), "data": data, "output": path}
        assert f"output: {path} is the data" in refused(command, values)
        assert Path(path).read_text() == before

    def test_a_file_where_a_folder_should_be(self, generation, refused, tmp_path):
        (tmp_path / "file").write_text("")
        values = generation | {"output": str(tmp_path / "file" / "out.jsonl")}
        assert f"{tmp_path}/file/" in refused("generate", values)


class TestFullDisk:
    @pytest.fixture(autouse=True)
    def full_disk(self, monkeypatch, tmp_path):
        def fail(descriptor):
            raise OSError(errno.ENOSPC, "No space left on device", "/full/disk")

        monkeypatch.setattr(files.os, "fsync", fail)

    def test_evaluate(self, tiny_folder, refused, tmp_path):
        values = recipe(tmp_path, tiny_folder)
        del values["data"]
        data = {"source": "shapes", "size": 2, "questions": 2, "image_size": 24}
        values["evaluation"] = {"data": data, "max_new_tokens": 2, "batch_size": 8}
        message = refused("evaluate", values)
        assert "the disk is full while writing /full/disk" in message
        assert "the same command goes on from there" in message
        assert not list((tmp_path / "out").glob("*"))

    def test_generate(self, generation, refused, tmp_path):
        message = refused("generate", generation)
        assert "stage generate: cannot write" in message
        assert "run the same command again, it goes on from there" in message
        assert not (tmp_path / "out" / "responses.jsonl").exists()

    def test_a_stage(self, tiny_folder, refused, tmp_path):
        values = recipe(tmp_path, tiny_folder, rounds=1, sampling={"max_new_tokens": 2})
        message = refused("align", values)
        assert "stage generate: cannot write" in message
        assert "No space left on device. 0 of 1 parts are finished and kept" in message


def test_other_errors_are_not_swallowed(generation, mmpo, monkeypatch):
    """A defect of the library keeps its traceback."""
    monkeypatch.setitem(cli.COMMANDS, "generate", lambda path, overrides: {}["no such key"])
    with pytest.raises(KeyError):
        mmpo("generate", generation)


BAD_ROWS = {
    "truncated": "image_broken",
    "no-bytes": "image_broken",
    "outside": "image_outside_folder",
    "missing": "image_missing",
    "empty-response": "empty_response",
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
            {"id": "empty-response", "prompt": ask, **pair, "rejected": " "},
            {"id": "too-long", "image": "0.png", "prompt": "red " * 30},
            {"id": "second", "image": "1.png", "prompt": "describe the picture .", **pair},
            {"id": "text", "prompt": ask},
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


def test_train_and_evaluate(mmpo, tiny_folder, tmp_path):
    """The commands end with what they made."""
    values = recipe(tmp_path, tiny_folder) | {
        "training": {"objective": {"type": "sft"}, "max_steps": 1, "batch_size": 8}
    }
    values["data"] = {"source": "shapes", "size": 4, "image_size": 24, "questions": 2}
    status, out, err = mmpo("train", values, "lengths.response=[32]")
    assert status == 0, err
    model = tmp_path / "out" / "model"
    assert out.splitlines()[-1] == f"model: {model}"
    values = recipe(tmp_path, tmp_path / "out")  # the run's folder: its last checkpoint
    del values["data"]
    evaluation = {"data": {"source": "shapes", "size": 3, "questions": 2, "image_size": 24}}
    evaluation |= {"max_new_tokens": 4, "batch_size": 8}
    status, out, err = mmpo("evaluate", values | {"evaluation": evaluation})
    assert status == 0, err
    assert {"sampled/chair_s", "greedy/recall", "yes_no_accuracy"} <= {
        line.split()[0] for line in out.splitlines()
    }
    saved = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert saved["model"] == str(tmp_path / "out")


def test_ctrl_c_is_no_traceback(generation, mmpo, monkeypatch):
    def interrupted(path, overrides):
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.COMMANDS, "generate", interrupted)
    status, _, told = mmpo("generate", generation)
    assert status == 130
    assert told == "mmpo generate: stopped; the same command goes on from what is finished\n"


def test_objectives_by_name(capsys):
    assert cli.main(["objectives", "mdpo"]) == 0
    assert "\nmdpo\n  mDPO: " in capsys.readouterr().out
    assert cli.main(["objectives", "dppo"]) == 1
    assert "there is no objective 'dppo'; did you mean dpo" in capsys.readouterr().err
