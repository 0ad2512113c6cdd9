"""`mmpo plan`: what a recipe takes of TPUs that are not there."""

from __future__ import annotations

import argparse
import json
import logging

from mmpo_jax.core.errors import MmpoError
from mmpo_jax.core.files import write_atomic
from mmpo_jax.planning.planned import plan_recipe
from mmpo_jax.planning.report import told
from mmpo_jax.planning.stages import Assumed
from mmpo_jax.planning.topology import find_topology
from mmpo_jax.recipes import recipe as recipes
from mmpo_jax.recipes.files import load_recipe, read_values

log = logging.getLogger(__name__)

KINDS = {
    "train": "TrainRecipe",
    "align": "AlignRecipe",
    "generate": "GenerateRecipe",
    "score": "ScoreRecipe",
    "select": "SelectRecipe",
}
"""Command -> class of its recipe."""
OF_ALIGN = {"rounds", "prompts_per_round", "candidates", "feedback", "pairing", "sampling"}
"""Keys that of the recipes with `training` only an alignment has."""


def main(options: argparse.Namespace) -> None:
    """
    Raises:
      MmpoError: the recipe cannot be planned, or something in it does not fit.
    """
    topology = find_topology(options.topology)
    values = read_values(options.recipe, options.overrides)
    command = options.command_of_recipe or command_of(set(values))
    kind = getattr(recipes, KINDS[command])
    recipe = load_recipe(kind, options.recipe, options.overrides)
    assumed = Assumed(
        rows=options.rows,
        claims=options.claims,
        responses=options.responses,
        image=options.image,
    )
    planned = plan_recipe(recipe, topology, assumed, optimised=not options.fast, dump=options.dump)
    print(told(planned))
    if options.json:
        write_atomic(options.json, json.dumps(planned.to_json(), indent=1).encode())
    failing = [run.run.program.name for run in planned.runs if not run.fits]
    if failing:
        raise MmpoError(
            f"{options.recipe} does not fit {options.topology}: {', '.join(failing)} "
            f"{'takes' if len(failing) == 1 else 'take'} more than a device has; split parameters "
            "over more (devices.fsdp, devices.tensor), take smaller micro-batches or remat: full"
        )


def command_of(keys: set[str]) -> str:
    """Which command runs a recipe with these keys.

    Raises:
      MmpoError: several could.
    """
    if "training" in keys:
        return "align" if keys & OF_ALIGN else "train"
    for key, command in (("reference", "select"), ("scoring", "score"), ("rounds", "align")):
        if key in keys:
            return command
    if "sampling" in keys:
        return "generate"
    raise MmpoError(f"which command is this recipe of? --as says it: {', '.join(KINDS)}")
