"""MM-DPO against DPO on the same pairs of the picture world, for w and k of the paper's grid.

    python benchmarks/mm_dpo_results.py --seeds 0 1 2 --output runs/mm_dpo

All pairs of captions of different ranks; margins are those of a reward model that has learned from
the same rankings (configs/picture_world_reward_scalar.yaml), or the scene's: how many faults the
one has more than the other. DPO, and MM-DPO with w and k 0.5 of either kind, get
the same learning rates to try (tried_rates.py); all other w and k take that of 0.5. Prints what the
rewards are like, and the tables of tries and results, those in docs/results.md.
"""

from __future__ import annotations

import os

import numpy as np
from objective_results import CONFIGS, Bench
from reward_results import Rankings, accuracies, ordered, read_rows
from tried_rates import Method, compare, parse_options

from mmpo_jax.commands.reward import run_rewarding
from mmpo_jax.commands.train import run_training
from mmpo_jax.recipes.command_recipes import RewardRecipe
from mmpo_jax.recipes.files import load_recipe
from mmpo_jax.recipes.train_recipe import TrainRecipe

RECIPE = "objectives/picture_world_mm_dpo"
RANKINGS, REWARDS = "rankings", "rewards.jsonl"
GRID = [(w, k) for w in (0.1, 0.5, 1.0) for k in (0.25, 0.5, 1.0)]
"""Of the paper's figure 12, which also has w = 0, DPO."""


def mm_dpo(margins: str, w: float, k: float) -> Method:
    """MM-DPO with margins of `rewards` or of the scene's `faults`."""
    values = (f"training.objective.w={w}", f"training.objective.k={k}")
    center = None if (w, k) == (0.5, 0.5) else named(margins, 0.5, 0.5)
    return Method(RECIPE, RANKINGS, values, REWARDS if margins == "rewards" else None, center)


def named(margins: str, w: float, k: float) -> str:
    return f"MM-DPO, {margins}, w {w}, k {k}"


METHODS = {
    "DPO": Method(RECIPE, RANKINGS, ("training.objective.w=0",)),
    **{named(of, *values): mm_dpo(of, *values) for of in ("rewards", "faults") for values in GRID},
}


def main() -> None:
    compare(parse_options(__doc__, "runs/mm_dpo", METHODS), METHODS, make_rewards)


def make_rewards(bench: Bench) -> None:
    """Trains a reward model on a seed's rankings, writes its rewards of them, and says what they
    are like."""
    data, output = os.path.join(bench.data, f"{RANKINGS}.jsonl"), os.path.join(bench.data, REWARDS)
    if not os.path.exists(output):
        settings = [
            f"seed={bench.seed}",
            f"output={os.path.join(bench.folder, 'reward_model')}",
            f"data.path={data}",
        ]
        path = os.path.join(CONFIGS, "picture_world_reward_scalar.yaml")
        model = run_training(load_recipe(TrainRecipe, path, settings))
        recipe = {
            "model": model,
            "data": {"path": data},
            "output": output,
            "rewarding": {"batch_size": 32},
        }
        run_rewarding(RewardRecipe.model_validate(recipe))
    print(f"seed {bench.seed} rewards: {told(read_rows(data), read_rows(output))}", flush=True)


def told(rankings: Rankings, rewarded: Rankings) -> str:
    """How rewards order the pairs that they were learned from, and their margins."""
    margins, faults = np.array(
        [
            (row["rewards"][better] - row["rewards"][worse], scores[better] - scores[worse])
            for ranking, row in zip(rankings, rewarded, strict=True)
            for scores in [[one["scores"]["score"] for one in ranking["responses"]]]
            for better, worse in ordered(ranking)
        ]
    ).T
    return (
        f"{accuracies(rankings, rewarded)['acc']:.3f} of {len(margins)} pairs in order; "
        f"margins {margins.mean():.2f} ({margins.std():.2f}), faults {faults.mean():.2f} "
        f"({faults.std():.2f}), correlation {np.corrcoef(margins, faults)[0, 1]:.2f}"
    )


if __name__ == "__main__":
    main()
