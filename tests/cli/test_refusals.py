"""Broken models, bad data and full disks: one clear message and exit status 1."""

import errno
import json
import re
import shutil
from pathlib import Path

import pytest
from helpers import tiny
from helpers.cli_recipes import POSSIBLE, recipe, write_rows

from mmpo_jax.core import files


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
        assert re.search(r"data\S*\.path: there is no \S*rows.jsonl", message)

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

    def test_questions_without_their_images(self, tiny_folder, refused, tmp_path):
        values = recipe(tmp_path, tiny_folder)
        del values["data"]
        row = {"question_id": 1, "image": "a.png", "text": "is there a star ?", "label": "yes"}
        path = write_rows(tmp_path, [row])
        message = refused("evaluate", values | {"evaluation": {"type": "pope", "data": path}})
        assert "rows.jsonl, row 1: " in message and "COCO val2014" in message
        (tmp_path / "a.png").write_bytes(b"no picture")
        message = refused("evaluate", values | {"evaluation": {"type": "pope", "data": path}})
        assert "pope: question '1': " in message and "a.png" in message

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

    @pytest.mark.slow
    def test_evaluate(self, tiny_folder, refused, tmp_path):
        values = recipe(tmp_path, tiny_folder)
        del values["data"]
        world = {"type": "picture_world", "size": 2, "questions": 2, "image_size": 24}
        values["evaluation"] = world | {"max_new_tokens": 2, "batch_size": 8}
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
        assert "the disk is full while writing /full/disk" in message
        assert "the same command goes on from there" in message
