"""Preference data of the picture world, which the recipes in configs/objectives learn from.

    python benchmarks/picture_world_preferences.py --output runs/picture_world_preferences

samples ten captions of each of 1,000 scenes from the checkpoint that ships with the package and
writes pairs.jsonl, rankings.jsonl, verdicts.jsonl and corrections.jsonl, and the pictures.
"""

from __future__ import annotations

import argparse
import os

from mmpo_jax.commands.generate import run_generation
from mmpo_jax.data.readers import read_records
from mmpo_jax.picture_world import records as world_records
from mmpo_jax.picture_world.preferences import write_preferences
from mmpo_jax.recipes.recipe import GenerateRecipe

SPLIT = "align"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", default="runs/picture_world_preferences")
    parser.add_argument("--prompts", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0, help="of the scenes and of the samples")
    options = parser.parse_args()
    for kind, number in make_preferences(options.output, options.prompts, options.seed).items():
        print(f"{number:5} {kind}")


def make_preferences(folder: str, prompts: int, seed: int) -> dict[str, int]:
    """Writes the files of one seed.

    Returns:
      How many rows each kind of data has.
    """
    recipe = {
        "seed": seed,
        "output": os.path.join(folder, "captions"),
        "model": "builtin:picture_world",
        "data": {"source": "picture_world", "split": SPLIT, "size": prompts, "seed": seed},
        "lengths": {"prompt": [24]},
        "sampling": {
            "num_samples": 10,
            "temperature": 1.0,
            "max_new_tokens": 32,
            "batch_size": 64,
        },
    }
    sampled, _ = read_records(run_generation(GenerateRecipe.model_validate(recipe)))
    scenes = world_records.scenes(SPLIT, seed, prompts)
    files = write_preferences(
        folder,
        (
            (record, [r.text for r in record.responses if r.finished], scene)
            for record, scene in zip(sampled, scenes, strict=True)
        ),
    )
    return {kind: _count(file) for kind, file in files.items()}


def _count(file: str) -> int:
    with open(file, "rb") as lines:
        return sum(1 for _ in lines)


if __name__ == "__main__":
    main()
