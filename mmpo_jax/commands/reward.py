"""`mmpo reward`: what a reward model says of every response of every row, as JSONL."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from jax.sharding import Mesh

from mmpo_jax.checkpoints.checkpoint import Checkpoint, open_reward_model
from mmpo_jax.commands.results import Results
from mmpo_jax.data.records import Record
from mmpo_jax.data.sources import RecordSet
from mmpo_jax.data.tokenization import TokenizedRecord
from mmpo_jax.data.usable import usable_records
from mmpo_jax.parallel.mesh import make_mesh
from mmpo_jax.recipes.command_recipes import RewardRecipe, SelectRecipe
from mmpo_jax.recipes.scoring import Rewarding
from mmpo_jax.reward_models.reading import Reading
from mmpo_jax.reward_models.scoring import Rewarded, score_responses


def main(recipe: RewardRecipe) -> None:
    print(f"rewards: {run_rewarding(recipe)}")


def run_rewarding(recipe: RewardRecipe) -> str:
    """Scores the responses of every usable row.

    Returns:
      The file, one line per row: `id`, `rewards`, and of every response its `critiques` and the
      standard deviation `std` of the rewards over them. A response without a reward has null, and
      the line says why in `problems`.
    """
    results = Results.at(recipe.output, "rewards", recipe.data)
    record_set = recipe.data.load(supervised=True)
    mesh = make_mesh(**recipe.devices.model_dump())
    checkpoint = open_reward_model(recipe.model, recipe.attention, recipe.template)
    reading = Reading.of(recipe.rewarding, checkpoint.model, recipe.model)
    records, _, rewarded = score_usable(
        recipe, record_set, checkpoint, reading, recipe.rewarding, results, mesh
    )
    return results.write(map(_line, records, rewarded))


def score_usable(
    recipe: RewardRecipe | SelectRecipe,
    record_set: RecordSet,
    checkpoint: Checkpoint,
    reading: Reading,
    rewarding: Rewarding,
    results: Results,
    mesh: Mesh,
) -> tuple[Sequence[Record], list[TokenizedRecord], list[Rewarded]]:
    """(the records that a reward model can be given, each as tokens, its rewards).

    Args:
      recipe: of the command.
      record_set: with responses.
      checkpoint: the reward model, whose parameters are read here.
      reading: how it reads responses.
      rewarding: the recipe's section.
      results: where the stages lie, and the rows that are left out.
      mesh: the devices.

    Raises:
      DataError: see `usable_records`.
    """
    record_set, tokenized = usable_records(
        record_set,
        checkpoint.processor,
        recipe.lengths,
        results.skipped,
        reading.unfit,
        reading.tokenize,
        alone=True,
    )
    rewarded = score_responses(
        checkpoint.reloaded(mesh),
        record_set.records,
        reading,
        rewarding,
        recipe.lengths,
        mesh,
        folder=results.parts,
        seed=recipe.seed,
    )
    return record_set.records, tokenized, rewarded


def _line(record: Record, rewarded: Rewarded) -> dict[str, Any]:
    line: dict[str, Any] = {
        "id": record.id,
        "rewards": [_or_null(reward) for reward in rewarded.rewards],
        "critiques": [*rewarded.critiques],
        "std": [_or_null(value) for value in rewarded.std],
    }
    problems = [*rewarded.problems]
    for place, reason, detail in record.left_out:  # in order
        line["rewards"].insert(place, None)
        line["critiques"].insert(place, [])
        line["std"].insert(place, None)
        problems.insert(place, (reason, detail))
    if any(problems):
        line["problems"] = [None if one is None else f"{one[0]}: {one[1]}" for one in problems]
    return line


def _or_null(value: float) -> float | None:
    return None if math.isnan(value) else float(value)
