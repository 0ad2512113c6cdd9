"""`mmpo evaluate`: what benchmarks say of a checkpoint."""

from __future__ import annotations

import os

from mmpo_jax.checkpoints.checkpoint import check_speaker, load_checkpoint
from mmpo_jax.commands.evaluate_answers import lines
from mmpo_jax.core.files import check_reachable, write_json
from mmpo_jax.core.processes import on_one
from mmpo_jax.evaluation.answers import Measuring
from mmpo_jax.evaluation.measure import Measured, check_questions, describe, measure, shown_metrics
from mmpo_jax.parallel.mesh import make_mesh
from mmpo_jax.recipes.command_recipes import EvaluateRecipe


def main(recipe: EvaluateRecipe) -> None:
    for measured in run_evaluation(recipe):
        print("\n".join([f"{measured.name}:", *lines(measured.scores)]))
        print(f"scores: {os.path.join(recipe.output, measured.name)}.scores.json")


def run_evaluation(recipe: EvaluateRecipe) -> list[Measured]:
    """Evaluates a Hugging Face folder, an Orbax checkpoint or a built-in model.

    Returns:
      What each benchmark says, see `evaluation.measure`; all values are also in `evaluation.json`
      of the output folder.
    """
    check_reachable(recipe.output)
    check_questions(recipe.evaluation)
    mesh = make_mesh(**recipe.devices.model_dump())
    check_speaker(recipe.model, "mmpo evaluate")
    checkpoint = load_checkpoint(recipe.model, mesh, recipe.attention, recipe.template)
    at = Measuring(checkpoint, mesh, recipe.output, recipe.lengths)
    measured = measure(recipe.evaluation, at)
    model = {"model": recipe.model, "fingerprint": checkpoint.fingerprint}
    told = model | describe(measured, shown_metrics(recipe.evaluation))
    told["recipe"] = recipe.model_dump(mode="json", exclude={"output"})
    on_one(lambda: write_json(os.path.join(recipe.output, "evaluation.json"), told))
    return measured
