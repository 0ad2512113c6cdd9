"""`mmpo evaluate`: the metrics of a checkpoint, as JSON."""

from __future__ import annotations

import json
import os

from mmpo_jax.checkpoints.checkpoint import check_speaker, load_checkpoint
from mmpo_jax.core.files import check_reachable, write_atomic
from mmpo_jax.core.processes import on_one
from mmpo_jax.evaluation.picture_world import evaluate_picture_world
from mmpo_jax.parallel.mesh import make_mesh
from mmpo_jax.recipes.recipe import EvaluateRecipe


def main(recipe: EvaluateRecipe) -> None:
    for name, value in run_evaluation(recipe).items():
        print(f"{name:24s} {value:.4f}")


def run_evaluation(recipe: EvaluateRecipe) -> dict[str, float]:
    """Evaluates a Hugging Face folder, an Orbax checkpoint or a built-in model.

    Returns:
      The metrics, also written to `evaluation.json` in the output folder.
    """
    check_reachable(recipe.output)
    mesh = make_mesh(**recipe.devices.model_dump())
    check_speaker(recipe.model, "mmpo evaluate")
    checkpoint = load_checkpoint(recipe.model, mesh, recipe.attention, recipe.template)
    metrics = evaluate_picture_world(
        checkpoint,
        recipe.evaluation,
        recipe.lengths,
        mesh,
    )
    report = {"model": recipe.model, "fingerprint": checkpoint.fingerprint, **metrics}
    path = os.path.join(recipe.output, "evaluation.json")
    on_one(lambda: write_atomic(path, json.dumps(report, indent=1).encode()))
    return metrics
