"""What is left of a training from a bfloat16 start: in the folder, as a model's name, converted."""

import json
import logging

import jax
import ml_dtypes
import numpy as np
import pytest
from helpers import meshes

from mmpo_jax import cli
from mmpo_jax.checkpoints.cards import MARGIN, SavedWeights
from mmpo_jax.checkpoints.checkpoint import load_start
from mmpo_jax.checkpoints.huggingface import load_model, save_model
from mmpo_jax.checkpoints.peft import with_adapter
from mmpo_jax.commands import train as training_run
from mmpo_jax.commands.train import run_training
from mmpo_jax.core.trees import flatten
from mmpo_jax.models.lora import merge_adapters
from mmpo_jax.recipes.train_recipe import TrainRecipe
from mmpo_jax.training.saving import tell_saved

Q = "language_model/layers/self_attn/q_proj/kernel"
ROWS = [
    {"id": str(i), "prompt": "what is it ?", "chosen": f"a {c} circle .", "rejected": "a star ."}
    for i, c in enumerate(("red", "blue", "green", "yellow"))
]


@pytest.fixture(scope="module")
def start(tiny_folder, tiny_model, tmp_path_factory):
    """The tiny checkpoint in bfloat16."""
    folder = tmp_path_factory.mktemp("start") / "model"
    save_model(folder, *tiny_model, tiny_folder, dtype="bfloat16")
    return folder


@pytest.fixture(scope="module", params=["full", "lora"])
def trained(request, start, tmp_path_factory):
    """(recipe of a finished run whose update is below the steps of bfloat16, its start)."""
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    lora = {"rank": 2, "target": ".*/q_proj"} if request.param == "lora" else None
    recipe = TrainRecipe.model_validate(
        {
            "output": str(folder / "run"),
            "model": str(start),
            "lengths": {"prompt": [16], "response": [8]},
            "data": {"source": "file", "path": str(folder / "rows.jsonl")},
            "training": {
                "objective": {"type": "dpo"},
                "optimizer": {"learning_rate": 1e-5},
                "schedule": {"warmup_ratio": 0},
                "lora": lora,
                "freeze": ["vision_tower/.*"],
                "epochs": 2,
                "batch_size": 4,
                "log_every": 1,
            },
        }
    )
    mesh = meshes.one_device()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_run, "make_mesh", lambda **_: mesh)
        run_training(recipe)
        yield recipe, start


def saved_again(recipe, dtype):
    """The finished run, saved in another dtype: the folder, and its card."""
    training = recipe.training.model_copy(update={"save_dtype": dtype})
    folder = run_training(recipe.model_copy(update={"training": training}))
    with open(f"{folder}/README.md") as file:
        return folder, file.read()


def stated(folder):
    with open(f"{folder}/config.json") as file:
        config = json.load(file)
    return {config[key] for key in ("dtype", "torch_dtype") if key in config}


def whole(recipe, start):
    """The parameters of the run, computed from what training itself keeps."""
    if recipe.training.lora is None:
        return flatten(load_start(recipe.output).params)
    model, base = load_model(start)
    wide = jax.tree.map(lambda leaf: leaf.astype(np.float32), base)
    return flatten(merge_adapters(with_adapter(wide, f"{recipe.output}/adapter", model)))


def same(actual, expected):
    for path, leaf in expected.items():
        wanted = np.asarray(leaf, np.float32)
        np.testing.assert_allclose(actual[path], wanted, rtol=0, atol=1e-7, err_msg=path)


@pytest.mark.slow
def test_by_default_nothing_is_lost(trained):
    recipe, start = trained
    folder, card = saved_again(recipe, "float32")
    params = flatten(load_model(folder)[1])
    assert {leaf.dtype for leaf in params.values()} == {np.dtype(np.float32)}
    assert stated(folder) == {"float32"}
    same(params, whole(recipe, start))
    before = flatten(load_model(start)[1])
    assert np.any(params[Q] != before[Q].astype(np.float32))
    assert "Saved in float32: the weights of the run, nothing rounded." in card


@pytest.mark.slow
def test_a_run_or_an_adapter_named_as_a_model_is_not_rounded(trained):
    recipe, start = trained
    names = [recipe.output]
    if recipe.training.lora is not None:
        names.append(f"{recipe.output}/adapter")
    for name in names:
        params = flatten(load_start(name).params)
        assert params[Q].dtype == np.float32
        same(params, whole(recipe, start))


@pytest.mark.parametrize("dtype", ["bfloat16", "bfloat16_stochastic", "float16"])
@pytest.mark.slow
def test_what_rounding_leaves_is_measured_and_told(trained, caplog, dtype):
    recipe, start = trained
    with caplog.at_level(logging.INFO):
        folder, card = saved_again(recipe, dtype)
    exact = whole(recipe, start)
    params = flatten(load_model(folder)[1])
    assert stated(folder) == {dtype.removesuffix("_stochastic")}
    before = flatten(load_model(start)[1])
    product = square = 0.0
    for path, leaf in exact.items():
        first, now, kept = (np.asarray(x, np.float64) for x in (before[path], leaf, params[path]))
        product += ((now - first) * (kept - first)).sum()
        square += ((now - first) ** 2).sum()
    share = product / square
    assert f"{share:.1%} of the update is in the saved weights." in card
    assert f"{share:.1%} of the update is in the saved weights." in caplog.text
    assert "rewards/margins of 4 rows: " in card
    if dtype == "bfloat16_stochastic":
        assert share == pytest.approx(1, abs=0.3)
    if dtype == "bfloat16":
        assert share < 0.5
        assert "much of the training is lost or changed in bfloat16" in caplog.text
        assert f"`mmpo convert {recipe.output} TARGET --dtype float32`" in caplog.text


@pytest.mark.parametrize(
    ("survived", "of_run", "as_saved", "lossy"),
    [
        (1.0, -0.02, -0.02, False),
        (1.0, -0.02, -0.001, True),
        (1.0, -0.02, -0.03, True),
        (1.0, 0.02, 0.0201, False),
        (1.0, 0.02, 0.001, True),
        (1.0, 0.0, 0.0, False),
        (1.0, -4e-9, -3e-8, False),  # numerical noise
        (0.5, 0.02, 0.02, True),
    ],
)
def test_what_is_warned_of(survived, of_run, as_saved, lossy, caplog):
    saved = SavedWeights("bfloat16", survived, MARGIN, 4, of_run, as_saved)
    assert saved.is_lossy() is lossy
    tell_saved("out/model", saved, "out")
    assert ("much of the training is lost or changed in bfloat16" in caplog.text) is lossy


@pytest.mark.slow
def test_convert_rounds_last_and_tells_what_is_left(trained, tmp_path, caplog):
    recipe, start = trained
    for dtype in ("float32", "bfloat16"):
        with caplog.at_level(logging.INFO):
            assert (
                cli.main(["convert", recipe.output, str(tmp_path / dtype), "--dtype", dtype]) == 0
            )
    assert cli.main(["convert", recipe.output, str(tmp_path / "auto")]) == 0
    for name in ("float32", "auto"):
        same(flatten(load_model(tmp_path / name)[1]), whole(recipe, start))
        assert stated(tmp_path / name) == {"float32"}
    half = flatten(load_model(tmp_path / "bfloat16")[1])
    assert {leaf.dtype for leaf in half.values()} == {np.dtype(ml_dtypes.bfloat16)}
    card = (tmp_path / "bfloat16" / "README.md").read_text()
    assert "of the update is in the saved weights." in card
    assert "much of the training is lost or changed in bfloat16" in caplog.text
