"""`mmpo evaluate`: the metrics of a checkpoint, as JSON."""

from __future__ import annotations

import json
import os

from mmpo_jax.checkpoint import load_checkpoint
from mmpo_jax.evaluation.shapes import evaluate_shapes
from mmpo_jax.files import check_reachable, write_atomic
from mmpo_jax.parallel.mesh import make_mesh
from mmpo_jax.recipe import EvaluateRecipe


def run_evaluation(recipe: EvaluateRecipe) -> dict[str, float]:
    """Evaluates a Hugging Face folder, an Orbax checkpoint or a built-in model.

    Returns:
      The metrics, also written to `evaluation.json` in the output folder.
    """
    check_reachable(recipe.output)
    mesh = make_mesh(**recipe.devices.model_dump())
    checkpoint = load_checkpoint(recipe.model, mesh, recipe.attention, recipe.template)
    metrics = evaluate_shapes(
        checkpoint.model,
        checkpoint.params,
        checkpoint.processor,
        recipe.evaluation,
        recipe.lengths,
        mesh,
    )
    report = {"model": recipe.model, "fingerprint": checkpoint.fingerprint, **metrics}
    path = os.path.join(recipe.output, "evaluation.json")
    write_atomic(path, json.dumps(report, indent=1).encode())
    return metrics
