"""No copy of the start model lies beside the state when a training takes its first step."""

import json

import jax
import pytest
from helpers.live_arrays import first_steps
from helpers.loop_runs import Killed, interrupted

from mmpo_jax.checkpoints.checkpoint import Checkpoint, load_start
from mmpo_jax.checkpoints.huggingface import save_model
from mmpo_jax.commands import train as train_command
from mmpo_jax.commands.train import run_training
from mmpo_jax.core.trees import flatten
from mmpo_jax.models.config import ModelError
from mmpo_jax.recipes.train_recipe import TrainRecipe

ROWS = [
    {"id": str(i), "prompt": "what is it ?", "chosen": f"a {c} circle .", "rejected": "a star ."}
    for i, c in enumerate(("red", "blue", "green", "yellow"))
]
KINDS = {
    "full": {},
    "frozen": {"freeze": ["vision_tower/.*", "language_model/layers/mlp/.*"]},
    "lora": {"lora": {"rank": 2, "target": ".*/q_proj"}},
    "online": {"reference": {"type": "online"}},
}


@pytest.fixture(autouse=True)
def one_device(mesh, monkeypatch):
    monkeypatch.setattr(train_command, "make_mesh", lambda **_: mesh)


@pytest.fixture(
    scope="module", params=[pytest.param("float32", marks=pytest.mark.slow), "bfloat16"]
)
def start(request, tiny_folder, tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("start") / request.param
    save_model(folder, *tiny_model, tiny_folder, dtype=request.param)
    return folder


def make_recipe(folder, model, **training) -> TrainRecipe:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return TrainRecipe.model_validate(
        {
            "output": str(folder / "run"),
            "model": str(model),
            "lengths": {"prompt": [16], "response": [8]},
            "data": {"source": "file", "path": str(folder / "rows.jsonl")},
            "training": {
                "optimizer": {"learning_rate": 1e-3},
                "schedule": {"warmup_ratio": 0},
                "epochs": 3,
                "batch_size": 4,
                "log_every": 1,
                "save_every": 1,
                **training,
            },
        }
    )


@pytest.mark.parametrize("kind", KINDS)
def test_at_the_first_step_there_is_the_state_alone(kind, start, tmp_path):
    recipe = make_recipe(tmp_path, start, **KINDS[kind])
    with first_steps() as beside:
        with interrupted(before_step=3), pytest.raises(Killed):
            run_training(recipe)
        run_training(recipe)
    assert beside == [{}, {}]  # begun, and resumed from a checkpoint


def test_what_was_let_go_is_read_again(tiny_folder, mesh):
    start = load_start(str(tiny_folder), mesh=mesh)
    whole = flatten(start.params)
    assert start.reloaded(mesh) is start
    path = "language_model/layers/self_attn/q_proj/kernel"
    start.release([path])
    assert whole.keys() - flatten(start.params).keys() == {path}
    again = flatten(start.reloaded(mesh).params)
    assert again.keys() == whole.keys()
    assert (again[path] == whole[path]).all()
    start.release()
    assert not flatten(start.params)
    assert flatten(start.reloaded(mesh).params).keys() == whole.keys()


def test_random_weights_are_made_again(tiny_folder, mesh):
    start = load_start(str(tiny_folder), 3, mesh)
    whole = flatten(start.params)
    start.release()
    again = flatten(start.reloaded(mesh).params)
    assert all((again[path] == leaf).all() for path, leaf in whole.items())


def test_another_model_in_its_place_is_not_taken_for_it(tiny_folder, tiny_model, tmp_path, mesh):
    model, params = tiny_model
    save_model(tmp_path / "start", model, params, tiny_folder)
    start = load_start(str(tmp_path / "start"), mesh=mesh)
    start.release()
    save_model(tmp_path / "start", model, jax.tree.map(lambda x: 2 * x, params), tiny_folder)
    with pytest.raises(ModelError, match="start: is no more what was loaded from it"):
        start.reloaded(mesh)
    with pytest.raises(ModelError, match="no file has them"):
        Checkpoint(model, start.processor, {}).reloaded(mesh)


@pytest.mark.parametrize("weights", ["pretrained", "random"])
def test_what_a_narrow_dtype_keeps_is_counted_from_the_start_that_was_let_go(
    weights, tiny_folder, tmp_path
):
    recipe = make_recipe(tmp_path, tiny_folder, save_dtype="bfloat16", reference={"type": "online"})
    folder = run_training(recipe.model_copy(update={"weights": weights}))
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert folder == str(tmp_path / "run" / "model")
    assert "of the update is in the saved weights." in card
    assert "rewards/margins of 4 rows: " in card
