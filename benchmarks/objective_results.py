"""One run of every objective family on the picture world: hallucination, recall, reward accuracy.

    python benchmarks/objective_results.py --seeds 0 1 2 --output runs/objectives

makes the preference data of each seed, trains every recipe of configs/objectives (or of --recipes)
on them, evaluates the results on held-out scenes and prints a Markdown table, the one in
docs/results.md. A run that is finished is not repeated: each has a JSON file.
"""

from __future__ import annotations

import argparse
import glob
import json
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from picture_world_preferences import LAST, make_preferences

from mmpo_jax.checkpoints.checkpoint import Checkpoint, load_checkpoint
from mmpo_jax.commands.train import run_training
from mmpo_jax.core.files import write_atomic
from mmpo_jax.data.sources import FileData
from mmpo_jax.data.tokenization import TokenizedRecord, tokenize_records
from mmpo_jax.evaluation.answers import Measuring
from mmpo_jax.evaluation.measure import measure
from mmpo_jax.parallel.mesh import make_mesh
from mmpo_jax.recipes.command_recipes import EvaluateRecipe
from mmpo_jax.recipes.evaluation import BenchmarkSection
from mmpo_jax.recipes.files import load_recipe
from mmpo_jax.recipes.train_recipe import TrainRecipe
from mmpo_jax.scoring.log_probs import score_records
from mmpo_jax.training.validation import hold_out

CONFIGS = os.path.join(os.path.dirname(__file__), os.pardir, "configs")
START = "start"
Columns = Sequence[tuple[str, str, int]]
"""(key of a figure, its head, its digits)."""
COLUMNS: Columns = (
    ("sampled/chair_s", "CHAIR_s, sampled", 3),
    ("greedy/chair_s", "greedy", 3),
    ("sampled/recall", "recall, sampled", 3),
    ("greedy/recall", "greedy", 3),
    ("yes_no_accuracy", "yes/no", 4),
    ("reward_accuracy/extremes", "reward accuracy, best against worst", 3),
    ("reward_accuracy/all", "all pairs", 3),
    ("seconds", "seconds", 0),
)

Result = Mapping[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--recipes", nargs="+", help="files; all of configs/objectives by default")
    parser.add_argument("--prompts", type=int, default=1000)
    parser.add_argument("--output", default="runs/objectives")
    parser.add_argument("--set", nargs="+", default=[], metavar="key=value", help="of all recipes")
    options = parser.parse_args()
    recipes = options.recipes or sorted(glob.glob(os.path.join(CONFIGS, "objectives", "*.yaml")))
    results: dict[str, list[Result]] = {}
    for seed in options.seeds:
        bench = Bench(os.path.join(options.output, f"seed-{seed}"), seed, options.prompts)
        for recipe in (None, *recipes):
            name, result = bench.run(recipe, options.set)
            results.setdefault(name, []).append(result)
            print(f"seed {seed} {row(name, [result])}", flush=True)
    print(table(results))


class Bench:
    """The data, the start model and the runs of one seed."""

    def __init__(self, folder: str, seed: int, prompts: int):
        self.folder, self.seed = folder, seed
        self.data = os.path.join(folder, "data")
        if not os.path.exists(os.path.join(self.data, LAST)):
            make_preferences(self.data, prompts, seed)
        # The seed moves the scenes, their captions, the order of training and what is sampled.
        path = os.path.join(CONFIGS, "picture_world_evaluate.yaml")
        recipe = load_recipe(EvaluateRecipe, path, [f"evaluation.seeds=[{seed}]"])
        (self.evaluation,), self.lengths = recipe.evaluation, recipe.lengths
        self.mesh = make_mesh()
        self.start = load_checkpoint(recipe.model, self.mesh)
        source = FileData(path=os.path.join(self.data, "rankings.jsonl")).load(supervised=True)
        rows, _ = tokenize_records(source.records, self.start.processor, self.lengths)
        # As the recipes hold out, by picture and prompt: nearly the same in all files. In one
        # with fewer prompts some at the edge of the share are on the other side.
        self.held = hold_out([rows], 0.1)[0][1]
        self.reference = self.score(self.start)

    def run(self, path: str | None, overrides: Sequence[str] = ()) -> tuple[str, Result]:
        """(the name of a recipe, its figures); without a path, those of the start model."""
        name = START if path is None else os.path.splitext(os.path.basename(path))[0]
        name = name.removeprefix("picture_world_")
        if path is None:
            return name, self.measured(name, self.evaluation)
        data = load_recipe(TrainRecipe, path).data[0]
        file = os.path.basename(data.path) if isinstance(data, FileData) else None
        return name, self.measured(name, self.evaluation, path, file, overrides)

    def measured(
        self,
        name: str,
        evaluation: BenchmarkSection,
        path: str | None = None,
        data: str | None = None,
        overrides: Sequence[str] = (),
    ) -> Result:
        """The figures of a run, which are kept in a JSON file.

        Args:
          name: of the run's folder and its JSON file.
          evaluation: the scenes; those of another split have a file of their own.
          path: of the recipe that is trained; None for the start model.
          data: file of this seed's that is learned from; None for the recipe's.
          overrides: of the recipe.
        """
        split = "" if evaluation.split == "test" else f".{evaluation.split}"
        run = os.path.join(self.folder, f"{name}{split}")

        def measured() -> Result:
            started = time.perf_counter()
            checkpoint, result = self.start, {}
            if path is not None:
                folder = self.train(path, os.path.join(self.folder, name), data, overrides)
                result["seconds"] = time.perf_counter() - started
                checkpoint = load_checkpoint(folder, self.mesh)
                result |= reward_accuracies(self.held, self.score(checkpoint), self.reference)
            at = Measuring(checkpoint, self.mesh, f"{run}.evaluation", self.lengths)
            (found,) = measure([evaluation], at)
            return result | found.scores.metrics

        return kept(f"{run}.json", measured)

    def train(self, path: str, output: str, data: str | None, overrides: Sequence[str]) -> str:
        """The folder of the trained model."""
        settings = [f"seed={self.seed}", f"output={output}", *overrides]
        if data is not None:
            settings.append(f"data.path={os.path.join(self.data, data)}")
        return run_training(load_recipe(TrainRecipe, path, settings))

    def score(self, checkpoint: Checkpoint) -> list[list[float]]:
        """Summed log-probs of the held-out captions."""
        return score_records(
            checkpoint, self.held, self.lengths, self.mesh, self.evaluation.batch_size
        )


def reward_accuracies(
    records: Sequence[TokenizedRecord],
    policy: Sequence[Sequence[float]],
    reference: Sequence[Sequence[float]],
) -> dict[str, float]:
    """Share of pairs whose better response gained more than the other.

    The reward is the log-ratio of policy and start model whatever was trained, so that methods
    without a reference and supervised ones have a figure too.

    Returns:
      `reward_accuracy/all` over the pairs of different ranks, `reward_accuracy/extremes` over those
      of a best and a worst response of their row.
    """
    right: dict[str, list[bool]] = {"reward_accuracy/extremes": [], "reward_accuracy/all": []}
    for record, ours, theirs in zip(records, policy, reference, strict=True):
        rewards = np.array(ours) - np.array(theirs)
        ranks = np.array([response.source.rank for response in record.responses])
        correct = rewards[:, None] > rewards[None, :]
        extremes = (ranks[:, None] == ranks.min()) & (ranks[None, :] == ranks.max())
        right["reward_accuracy/extremes"] += correct[extremes].tolist()
        right["reward_accuracy/all"] += correct[ranks[:, None] < ranks[None, :]].tolist()
    return {name: float(np.mean(values)) for name, values in right.items()}


def kept(file: str, measure: Callable[[], Result]) -> Result:
    """The figures in a JSON file, which are measured where it is not there."""
    if os.path.exists(file):
        with open(file) as text:
            return json.load(text)
    result = measure()
    write_atomic(file, json.dumps(result, indent=1).encode())
    return result


def table(results: Mapping[str, Sequence[Result]], columns: Columns = COLUMNS) -> str:
    """Mean (standard deviation) of every recipe over its seeds."""
    heads = ["", "seeds", *(head for _, head, _ in columns)]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    return "\n".join([*lines, *(row(name, runs, columns) for name, runs in results.items())])


def row(name: str, runs: Sequence[Result], columns: Columns = COLUMNS) -> str:
    cells = [
        _spread([run[key] for run in runs if key in run], digits) for key, _, digits in columns
    ]
    return "| " + " | ".join([name, str(len(runs)), *cells]) + " |"


def _spread(values: Sequence[float], digits: int) -> str:
    if not values:  # the start model has no reward
        return ""
    text = f"{statistics.fmean(values):.{digits}f}"
    return text if len(values) < 2 else f"{text} ({statistics.stdev(values):.{digits}f})"


if __name__ == "__main__":
    main()
