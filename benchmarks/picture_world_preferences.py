"""Preference data of the picture world, which the recipes in configs/objectives learn from.

    python benchmarks/picture_world_preferences.py --output runs/picture_world_preferences

samples ten captions of each of 1,000 scenes from the checkpoint that ships with the package and
writes pairs.jsonl, rankings.jsonl, verdicts.jsonl and true_pairs.jsonl, the pictures, and what
`mmpo correct` makes of both kinds of pairs: corrections.jsonl and true_corrections.jsonl.
"""

from __future__ import annotations

import argparse
import os
from typing import Any

from mmpo_jax.commands.correct import run_correction
from mmpo_jax.commands.generate import run_generation
from mmpo_jax.data.readers import read_records
from mmpo_jax.picture_world import records as world_records
from mmpo_jax.picture_world.preferences import write_preferences
from mmpo_jax.recipes.command_recipes import CorrectRecipe, GenerateRecipe

SPLIT = "align"
MAX_ERRORS = 2
"""Errors of a caption that are asked about: its dialogue is to stay below 96 tokens."""
CORRECTED = {"pairs": "corrections", "true_pairs": "true_corrections"}
"""Kinds of pairs, and what their files are called with the corrections of the rejected captions."""
LAST = "true_corrections.jsonl"
"""The file that is written last."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", default="runs/picture_world_preferences")
    parser.add_argument("--prompts", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0, help="of the scenes and of the samples")
    options = parser.parse_args()
    for kind, number in make_preferences(options.output, options.prompts, options.seed).items():
        print(f"{number:5} {kind}")


def make_preferences(folder: str, prompts: int, seed: int, split: str = SPLIT) -> dict[str, int]:
    """Writes the files of one seed.

    Args:
      folder: of the files.
      prompts: as many scenes.
      seed: of the scenes and of the samples.
      split: of the scenes.

    Returns:
      How many rows each kind of data has.
    """
    recipe = {
        "seed": seed,
        "output": os.path.join(folder, "captions"),
        "model": "builtin:picture_world",
        "data": {"source": "picture_world", "split": split, "size": prompts, "seed": seed},
        "lengths": {"prompt": [24]},
        "sampling": {
            "num_samples": 10,
            "temperature": 1.0,
            "max_new_tokens": 32,
            "batch_size": 64,
        },
    }
    sampled, _ = read_records(run_generation(GenerateRecipe.model_validate(recipe)))
    scenes = world_records.scenes(split, seed, prompts)
    files = write_preferences(
        folder,
        (
            (record, [r.text for r in record.responses if r.finished], scene)
            for record, scene in zip(sampled, scenes, strict=True)
        ),
    )
    made = {name: correct(files[kind], seed) for kind, name in CORRECTED.items()}
    return {kind: _count(file) for kind, file in {**files, **made}.items()}


def correct(pairs: str, seed: int, suffix: str = "", **changes: Any) -> str:
    """Corrects a file of pairs by rule; the file that this makes, beside it.

    Args:
      pairs: the file.
      seed: of the order of the questions.
      suffix: of the new file's name.
      changes: of the recipe.
    """
    folder, name = os.path.split(pairs)
    output = os.path.join(folder, f"{CORRECTED[os.path.splitext(name)[0]]}{suffix}.jsonl")
    recipe = {"seed": seed, "output": output, "data": {"path": pairs}, "max_errors": MAX_ERRORS}
    return run_correction(CorrectRecipe.model_validate(recipe | changes))


def _count(file: str) -> int:
    with open(file, "rb") as lines:
        return sum(1 for _ in lines)


if __name__ == "__main__":
    main()
