"""The recipes of configs/objectives: each trains on the data that it names."""

import json
from pathlib import Path

import numpy as np
import pytest

import mmpo_jax
from mmpo_jax.checkpoints.huggingface import load_model
from mmpo_jax.commands.correct import run_correction
from mmpo_jax.commands.train import run_training
from mmpo_jax.core.trees import flatten
from mmpo_jax.objectives.catalog import OBJECTIVES
from mmpo_jax.objectives.registry import REFERENCES
from mmpo_jax.picture_world.language import hallucinated_caption, true_caption
from mmpo_jax.picture_world.preferences import write_preferences
from mmpo_jax.picture_world.records import prompt_records, scenes
from mmpo_jax.recipes.command_recipes import CorrectRecipe
from mmpo_jax.recipes.files import load_recipe
from mmpo_jax.recipes.train_recipe import TrainRecipe
from mmpo_jax.training.metrics import FILE, read_metrics

RECIPES = sorted((Path(mmpo_jax.__file__).parent.parent / "configs/objectives").glob("*.yaml"))
SCENES = 12


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """kind of data -> its file, with captions that the language makes."""
    rng = np.random.default_rng(0)
    asked = [
        (
            record,
            [
                hallucinated_caption(scene, rng),
                true_caption(scene, rng),
                hallucinated_caption(scene, rng),
                "there is a .",
            ],
            scene,
        )
        for record, scene in zip(
            prompt_records("align", 0, SCENES, image_size=24),
            scenes("align", 0, SCENES),
            strict=True,
        )
    ]
    files = write_preferences(str(tmp_path_factory.mktemp("preferences")), asked)
    corrected = files["pairs"].replace("pairs", "corrections")
    recipe = {"output": corrected, "data": {"path": files["pairs"]}, "max_errors": 2}
    return {**files, "corrections": run_correction(CorrectRecipe.model_validate(recipe))}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
@pytest.mark.slow
def test_recipe_trains(path, data, tiny_folder, tiny_model, tmp_path):
    written = load_recipe(TrainRecipe, path)
    recipe = load_recipe(
        TrainRecipe,
        path,
        [
            f"data.path={data[Path(written.data[0].path).stem]}",
            f"model={tiny_folder}",
            f"output={tmp_path}",
            "training.batch_size=8",
            "training.max_steps=1",
            "validation=null",
        ],
    )
    trained = flatten(load_model(run_training(recipe))[1])
    (row,) = read_metrics(str(tmp_path / FILE))
    assert all(np.isfinite(value) for value in row.values()), json.dumps(row)
    start = flatten(tiny_model[1])
    changed = {name for name in start if not np.array_equal(start[name], trained[name])}
    assert changed == {name for name in start if "language_model" in name and "/mlp/" in name}


def compared(needs):
    """What objectives need, any kind of reference being one."""
    return needs | {"reference"} if needs & REFERENCES.keys() else needs


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_held_out_rows_choose_the_result_by_a_metric_that_is_there(path):
    recipe = load_recipe(TrainRecipe, path)
    needs = OBJECTIVES[recipe.training.objective[0].type].needs
    # Without a reference the start model's rewards are in order already, and it would be best.
    metric = "eval_rewards/accuracies" if {"rank", "reference"} <= compared(needs) else "eval_loss"
    assert recipe.validation.metric == metric
    assert recipe.validation.share == 0.1


def test_every_kind_of_objective_has_a_recipe():
    kinds = {
        OBJECTIVES[section.type].kind
        for path in RECIPES
        for section in load_recipe(TrainRecipe, path).training.objective
    }
    assert kinds >= {"pairs", "rankings", "single responses", "tokens"}
