"""`mmpo plan`: what a recipe takes of TPUs that are not there."""

from __future__ import annotations

import argparse
import logging

from mmpo_jax.core.errors import MmpoError
from mmpo_jax.core.files import write_json
from mmpo_jax.planning.planned import plan_recipe
from mmpo_jax.planning.report import told, told_choices
from mmpo_jax.planning.search import search
from mmpo_jax.planning.stages import Assumed
from mmpo_jax.planning.topology import Topology, find_topology
from mmpo_jax.recipes.align_recipe import AlignRecipe
from mmpo_jax.recipes.base import Base
from mmpo_jax.recipes.command_recipes import (
    GenerateRecipe,
    RewardRecipe,
    ScoreRecipe,
    SelectRecipe,
)
from mmpo_jax.recipes.files import load_recipe, read_values
from mmpo_jax.recipes.train_recipe import TrainRecipe

log = logging.getLogger(__name__)

KINDS: dict[str, type[Base]] = {
    "train": TrainRecipe,
    "align": AlignRecipe,
    "generate": GenerateRecipe,
    "score": ScoreRecipe,
    "reward": RewardRecipe,
    "select": SelectRecipe,
}
"""Command -> class of its recipe, of those that are planned."""
OF_ALIGN = {
    *("rounds", "prompts_per_round", "candidates", "feedback", "pairing", "sampling"),
    "selection",
}
"""Keys that of the recipes with `training` only an alignment has."""


def main(options: argparse.Namespace) -> None:
    """
    Raises:
      MmpoError: the recipe cannot be planned, or something in it does not fit.
    """
    topology = find_topology(options.topology)
    values = read_values(options.recipe, options.overrides)
    command = options.command_of_recipe or command_of(set(values))
    recipe = load_recipe(KINDS[command], options.recipe, options.overrides)
    assumed = Assumed(
        rows=options.rows,
        claims=options.claims,
        responses=options.responses,
        image=options.image,
    )
    if options.search:
        _search(options, recipe, topology, assumed)
        return
    planned = plan_recipe(recipe, topology, assumed, optimised=not options.fast, dump=options.dump)
    print(told(planned))
    if options.json:
        write_json(options.json, planned.to_json())
    failing = [run.run.program.name for run in planned.runs if not run.fits]
    if failing:
        raise MmpoError(
            f"{options.recipe} does not fit {options.topology}: {', '.join(failing)} "
            f"{'takes' if len(failing) == 1 else 'take'} more than a device has; split parameters "
            "over more (devices.fsdp, devices.tensor), take smaller micro-batches or remat: full"
        )


def _search(
    options: argparse.Namespace, recipe: Base, topology: Topology, assumed: Assumed
) -> None:
    """Ranks what else the recipe's keys could be.

    Raises:
      MmpoError: nothing that was compiled fits.
    """
    found = search(
        recipe,
        topology,
        assumed,
        compilations=options.compilations,
        optimised=not options.fast,
    )
    print(told_choices(found))
    if options.json:
        write_json(
            options.json,
            [{"changes": dict(one.changes), **one.planned.to_json()} for one in found],
        )
    if not any(one.planned.fits for one in found):
        raise MmpoError(
            f"none of the {len(found)} choices that were compiled fits {topology.name}; more "
            "--compilations go on with slower ones"
        )


def command_of(keys: set[str]) -> str:
    """Which command runs a recipe with these keys.

    Raises:
      MmpoError: several could.
    """
    if "training" in keys:
        return "align" if keys & OF_ALIGN else "train"
    for key, command in (
        ("reference", "select"),
        ("reward_model", "select"),
        ("scoring", "score"),
        ("rewarding", "reward"),
        ("rounds", "align"),
    ):
        if key in keys:
            return command
    if "sampling" in keys:
        return "generate"
    raise MmpoError(f"which command is this recipe of? --as says it: {', '.join(KINDS)}")
