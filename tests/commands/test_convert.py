"""`mmpo convert`: runs to Hugging Face folders and back, bit for bit."""

import dataclasses
import json
import math
import re
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
from helpers import meshes

from mmpo_jax import cli
from mmpo_jax.checkpoints import orbax as checkpoints
from mmpo_jax.checkpoints.cards import SavedWeights, make_card, read_saved, save_card
from mmpo_jax.checkpoints.checkpoint import Origin, load_checkpoint
from mmpo_jax.checkpoints.configs import load_config
from mmpo_jax.checkpoints.fingerprints import fingerprint_model
from mmpo_jax.checkpoints.huggingface import load_model, load_params, save_model
from mmpo_jax.checkpoints.locations import locate
from mmpo_jax.checkpoints.orbax import find_checkpoint
from mmpo_jax.checkpoints.run_checkpoints import Checkpoints
from mmpo_jax.checkpoints.steps import CheckpointError
from mmpo_jax.core import progress
from mmpo_jax.core.trees import flatten
from mmpo_jax.models.model import Model
from mmpo_jax.recipes.train_recipe import TrainRecipe


@pytest.fixture(scope="module")
def mesh():
    return meshes.mesh_of(1, 4, 2)


@pytest.fixture(scope="module")
def run_folder(tiny_folder, tmp_path_factory):
    """The tiny checkpoint as a run."""
    folder = tmp_path_factory.mktemp("converted") / "run"
    assert cli.main(["convert", str(tiny_folder), str(folder)]) == 0
    return folder


def same(actual, expected):
    actual, expected = flatten(actual), flatten(expected)
    assert actual.keys() == expected.keys()
    for path, leaf in expected.items():
        assert actual[path].dtype == leaf.dtype
        np.testing.assert_array_equal(np.asarray(actual[path]), leaf, err_msg=path)


@pytest.mark.slow
def test_there_and_back(run_folder, tiny_folder, tmp_path, capsys):
    assert find_checkpoint(run_folder) == (
        str(run_folder / "checkpoints" / "0"),
        str(run_folder / "base"),
    )
    assert cli.main(["convert", str(run_folder), str(tmp_path / "back")]) == 0
    assert f"Hugging Face folder: {tmp_path / 'back'}" in capsys.readouterr().out
    for name in ("model.safetensors", "tokenizer.json", "config.json", "chat_template.jinja"):
        written, source = (folder / name for folder in (tmp_path / "back", tiny_folder))
        assert written.read_bytes() == source.read_bytes(), name


def test_a_converted_folder_is_a_start(run_folder, tiny_model, tiny_processor, mesh):
    checkpoint = load_checkpoint(str(run_folder), mesh)
    same(checkpoint.params, tiny_model[1])
    assert checkpoint.processor.fingerprints() == tiny_processor.fingerprints()
    leaf = flatten(checkpoint.params)["language_model/layers/self_attn/q_proj/kernel"]
    assert {shard.data.shape for shard in leaf.addressable_shards} == {(2, 8, 16)}


def test_the_card_of_a_run(run_folder, tiny_model, tmp_path):
    recipe = TrainRecipe(model="org/name", output="out", data={"source": "file", "path": "a.jsonl"})
    shutil.copytree(run_folder, tmp_path / "run")
    save_card(tmp_path / "run" / "base", make_card(recipe, tiny_model[0], {}, from_hub=True))
    rows = [{"step": 0, "loss": 0.25}, {"step": 8, "loss": 0.125}]
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert cli.main(["convert", str(tmp_path / "run"), str(tmp_path / "back")]) == 0
    card = (tmp_path / "back" / "README.md").read_text()
    assert "base_model: org/name" in card
    assert "| loss | 0.25 |" in card


@pytest.mark.parametrize("start", ["of the run", "another", "not told", "gone", "random"])
def test_what_is_left_of_the_update_is_counted_from_the_start_of_the_run(
    start, run_folder, tiny_folder, tiny_model, tmp_path, caplog
):
    """Of another folder under its name there would be a figure that means nothing."""
    model, params = tiny_model
    base, run = tmp_path / "base", shutil.copytree(run_folder, tmp_path / "run")
    save_model(base, model, jax.tree.map(lambda leaf: leaf * np.float32(1.1), params), tiny_folder)
    known = {
        "of the run": fingerprint_model(base),
        "not told": "",
        "random": Origin(locate(str(base)), 0).fingerprint(model.config),
    }.get(start, "of another")
    if start == "gone":
        shutil.rmtree(base)
    recipe = TrainRecipe(
        model=str(base),
        weights="random" if start == "random" else "pretrained",
        output="out",
        data={"source": "file", "path": "a.jsonl"},
    )
    card = make_card(recipe, model, {}, from_hub=False, base_fingerprint=known)
    save_card(run / "base", card)
    with caplog.at_level("INFO"):
        arguments = ["convert", str(run), str(tmp_path / "back"), "--dtype", "bfloat16"]
        assert cli.main(arguments) == 0
    told = {
        "of the run": "100.0% of the update is in the saved weights.",
        "another": f"is not known: {base} is not what the run started from.",
        "not told": f"is not known: the run does not say what {base} was when it started.",
        "gone": f"is not known: {base} cannot be read: ",
        "random": "100.0% of the update is in the saved weights.",
    }
    for text in ((tmp_path / "back" / "README.md").read_text(), caplog.text):
        assert told[start] in text
        assert text.count("of the update") == 1


def test_how_far_a_checkpoint_is_can_be_told(tmp_path, monkeypatch):
    """Orbax waits for a write before it, and then for this one."""
    told = []
    wait = checkpoints.ocp.CheckpointManager.wait_until_finished

    def waiting(manager):
        wait(manager)
        told.append(progress.describe())

    monkeypatch.setattr(checkpoints.ocp.CheckpointManager, "wait_until_finished", waiting)
    values = np.random.default_rng(0).standard_normal(1_000_000).astype(np.float32)
    checkpoints.save_start(tmp_path, {"a": {"b": values}})
    assert re.match(r"writing the checkpoint: [34] of 4 MB", told[-1])


def test_a_card_holds_no_nan(tiny_model, tmp_path):
    recipe = TrainRecipe(model="org/name", output="out", data={"source": "file", "path": "a.jsonl"})
    card = make_card(recipe, tiny_model[0], {"loss": math.nan}, from_hub=True)
    saved = SavedWeights("bfloat16", 0.5, "loss", 4, math.nan, math.inf)
    save_card(tmp_path, dataclasses.replace(card, saved=saved))

    def refuse(constant):
        raise AssertionError(constant)

    values = json.loads((tmp_path / "card.json").read_text(), parse_constant=refuse)
    assert values["metrics"] == {"loss": None}
    again = read_saved(values["saved"])
    assert again.survived == 0.5 and math.isnan(again.of_run)
    assert "loss of 4 rows: nan of the run" in " ".join(again.lines())


@pytest.mark.slow
def test_dtypes(run_folder, tiny_folder, tiny_model, tmp_path, mesh):
    half = jax.tree.map(lambda leaf: leaf.astype(ml_dtypes.bfloat16), tiny_model[1])
    for source, target in ((tiny_folder, "run"), (run_folder, "folder")):
        arguments = ["convert", str(source), str(tmp_path / target), "--dtype", "bfloat16"]
        assert cli.main(arguments) == 0
    same(load_checkpoint(str(tmp_path / "run"), mesh).params, half)
    same(load_model(tmp_path / "folder")[1], half)
    config = json.loads((tmp_path / "folder" / "config.json").read_text())
    assert "bfloat16" in (config.get("dtype"), config.get("torch_dtype"))


@pytest.mark.slow
def test_a_model_without_a_tokenizer(tiny_folder, tmp_path, capsys):
    """Weights need none."""
    source = tmp_path / "source"
    source.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(tiny_folder / name, source)
    assert cli.main(["convert", str(source), str(tmp_path / "run")]) == 0
    assert cli.main(["convert", str(tmp_path / "run"), str(tmp_path / "back")]) == 0
    params = load_params(tmp_path / "back", Model.create(load_config(source)))
    same(params, load_model(tiny_folder)[1])


@pytest.mark.parametrize(
    ("source", "target", "told"),
    [
        ("{tiny}", "{tmp}", "is there already; give a new folder"),
        ("{tiny}", "gs://bucket/model", "is in a bucket; give a folder of this machine"),
        ("/nowhere", "{tmp}/out", "/nowhere: there is no such checkpoint folder"),
        ("{tmp}", "{tmp}/out", "config.json: not found"),
    ],
)
def test_what_cannot_be_converted(source, target, told, tiny_folder, tmp_path, capsys):
    names = {"tiny": tiny_folder, "tmp": tmp_path}
    assert cli.main(["convert", source.format(**names), target.format(**names)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("mmpo convert: ")
    assert told in error
    assert not list(tmp_path.iterdir())


def test_no_training_goes_on_from_a_converted_folder(run_folder):
    other = Checkpoints(run_folder, {"seed": 0}, 1)
    with pytest.raises(CheckpointError, match=r"recipe: seed \(null there, 0 here\), converted"):
        other.restore(None)
    other.close()


def test_a_checkpoint_of_another_model(run_folder, tmp_path, mesh):
    copy = shutil.copytree(run_folder, tmp_path / "run")
    config = json.loads((copy / "base" / "config.json").read_text())
    config["text_config"]["intermediate_size"] = 64
    (copy / "base" / "config.json").write_text(json.dumps(config))
    with pytest.raises(Exception, match=r"has shape \(2, 48, 32\), the config gives \(2, 64, 32\)"):
        load_checkpoint(str(copy), mesh)
