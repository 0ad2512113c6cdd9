"""A run as the model of a command: what it computes in."""

import json
import shutil

import pytest
from jax import numpy as jnp

from mmpo_jax.checkpoint import compute_dtype, is_run_in_bfloat16, load_start
from mmpo_jax.convert import convert
from mmpo_jax.evaluation import run as evaluation
from mmpo_jax.generation import run as generation
from mmpo_jax.models.huggingface import flatten
from mmpo_jax.recipe import EvaluateRecipe, GenerateRecipe, ScoreRecipe
from mmpo_jax.scoring import run as scoring


class Loaded(Exception):
    """What a command loaded; nothing needs to be computed."""


@pytest.fixture(scope="module")
def run_folder(tiny_folder, tmp_path_factory):
    """A run of float32 weights whose card says that its start was bfloat16."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    convert(str(tiny_folder), str(folder))
    card = {"base_model": "m", "is_on_hub": False, "task": "t", "method": "dpo", "data": {}}
    card |= {"recipe": {}, "metrics": {}, "base_fingerprint": "f", "base_dtype": "bfloat16"}
    (folder / "base" / "card.json").write_text(json.dumps(card))
    return folder


def test_what_a_run_computes_in(run_folder, tmp_path):
    assert is_run_in_bfloat16(str(run_folder))
    assert compute_dtype(str(run_folder), load_start(str(run_folder))) == "bfloat16"
    copy = shutil.copytree(run_folder, tmp_path / "run")
    (copy / "base" / "card.json").unlink()  # as in runs of before
    assert not is_run_in_bfloat16(str(copy))
    assert compute_dtype(str(copy), load_start(str(copy))) == "float32"


@pytest.mark.parametrize(
    ("module", "name", "recipe", "dtype"),
    [
        (generation, "generate_stage", GenerateRecipe, "bfloat16"),
        (evaluation, "evaluate_shapes", EvaluateRecipe, "bfloat16"),
        (scoring, "score_stage", ScoreRecipe, "float32"),  # exact
    ],
)
def test_commands(module, name, recipe, dtype, run_folder, tmp_path, monkeypatch):
    def stop(model, params, *args, **options):
        raise Loaded({leaf.dtype for leaf in flatten(params).values()}, options)

    monkeypatch.setattr(module, name, stop)
    data = {"source": "shapes", "split": "align", "size": 2, "image_size": 24}
    options = {"model": str(run_folder), "output": str(tmp_path / "out")}
    if recipe is not EvaluateRecipe:
        options |= {"data": data if name != "score_stage" else _pairs(tmp_path)}
    function = next(value for key, value in vars(module).items() if key.startswith("run_"))
    with pytest.raises(Loaded) as caught:
        function(recipe.model_validate(options))
    dtypes, given = caught.value.args
    assert dtypes == {jnp.dtype(dtype)}
    assert given.get("compute_dtype", dtype) == dtype


def _pairs(folder):
    row = {"id": "a", "prompt": "is there a star ?", "chosen": "yes", "rejected": "no"}
    (folder / "rows.jsonl").write_text(json.dumps(row))
    return {"source": "file", "path": str(folder / "rows.jsonl")}
