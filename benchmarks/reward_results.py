"""Reward models on the picture world: behind critiques, behind terse ones, and without any.

    python benchmarks/reward_results.py --seeds 0 1 2 --output runs/reward

Every method learns from the first rankings of a seed that have so many pairs, always in the same
number of steps. All get the same learning rates to try: with the first seed and the middle number
of pairs, on the split `validation`; the one that has most pairs in order is taken for all. Terse
critiques are the verdicts with which the others, which go through every claim, end. Measured on the
split `test`: the share of pairs whose better caption has the larger reward (Acc), and of prompts
all of whose pairs have (Acc+); a tie is wrong. A run that is finished is not repeated: each has a
JSON file.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from objective_results import CONFIGS, Result, kept, row, table
from picture_world_preferences import make_preferences

from mmpo_jax.cli import start_jax
from mmpo_jax.commands.reward import run_rewarding
from mmpo_jax.commands.train import run_training
from mmpo_jax.data.files import write_rows
from mmpo_jax.picture_world.critiques import verdict
from mmpo_jax.recipes.command_recipes import RewardRecipe
from mmpo_jax.recipes.files import load_recipe
from mmpo_jax.recipes.train_recipe import TrainRecipe

COLUMNS = (("acc", "Acc", 3), ("acc_plus", "Acc+", 3))
RANKINGS, TERSE = "rankings.jsonl", "terse_rankings.jsonl"


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to train reward models."""

    recipe: str
    data: str
    readings: Mapping[str, Mapping[str, Any]]
    """Ways to read responses that are measured -> options of `mmpo reward`; the first chooses the
    learning rate, and the others are measured at the largest number of pairs."""


READINGS = {
    "own critique": {"critiques": 1},
    "mean of 4 own critiques": {"critiques": 4},
    "critiques by rule": {"given_critiques": True},
    "no critique": {"critiques": 0},
}
METHODS = {
    "scalar": Method("picture_world_reward_scalar", RANKINGS, {"": {}}),
    "critiques": Method("picture_world_reward", RANKINGS, READINGS),
    "terse critiques": Method("picture_world_reward", TERSE, READINGS),
}


Rankings = Sequence[Mapping[str, Any]]
"""Rows of preferences, as JSON."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rates", nargs="+", default=["1e-3", "2e-3", "4e-3"])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--pairs", type=int, nargs="+", default=[250, 1000, 4000])
    parser.add_argument("--prompts", type=int, default=1000, help="that pairs are drawn from")
    parser.add_argument("--held-out", type=int, default=150, help="prompts that are measured on")
    parser.add_argument("--steps", type=int, default=300, help="of every training")
    parser.add_argument("--output", default="runs/reward")
    options = parser.parse_args()
    start_jax()
    tries: dict[str, list[Result]] = {}
    test: dict[str, list[Result]] = {}
    chosen: dict[str, str] = {}
    for seed in options.seeds:
        runs = Runs(
            os.path.join(options.output, f"seed-{seed}"),
            seed,
            {"align": options.prompts, "validation": options.held_out, "test": options.held_out},
            options.steps,
        )
        if not chosen:
            middle = sorted(options.pairs)[len(options.pairs) // 2]
            tries, chosen = try_rates(runs, options.methods, options.rates, middle)
        for name, pairs in itertools.product(options.methods, options.pairs):
            first, *others = METHODS[name].readings
            for reading in (first, *others) if pairs == max(options.pairs) else (first,):
                result = runs.measure(name, pairs, chosen[name], reading, "test")
                case = named(name, chosen[name], f"{pairs} pairs", reading)
                test.setdefault(case, []).append(result)
                print(f"seed {seed} {row(case, [result], COLUMNS)}", flush=True)
    print(f"\nlearning rates, seed {options.seeds[0]}, validation:\n{table(tries, COLUMNS)}")
    print(f"\ntest:\n{table(test, COLUMNS)}")


@dataclasses.dataclass(frozen=True)
class Runs:
    """The data and the reward models of one seed."""

    folder: str
    seed: int
    prompts: Mapping[str, int]
    """Split -> scenes whose captions are compared."""
    steps: int
    """Of every training."""

    def measure(self, name: str, pairs: int, rate: str, reading: str, split: str) -> Result:
        """How a method's reward model orders the pairs of a split."""
        run = f"{_words(name)}-{pairs}-{rate}"
        file = os.path.join(self.folder, f"{run}{_words(reading)}.{split}.json")

        def measured() -> Result:
            method = METHODS[name]
            model = self.train(method, pairs, rate, os.path.join(self.folder, run))
            data = self.data(method.data, split)
            options = {"batch_size": 32, "max_new_tokens": 96, **method.readings[reading]}
            recipe = RewardRecipe.model_validate(
                {
                    "seed": self.seed,
                    "model": model,
                    "data": {"path": data},
                    "output": os.path.splitext(file)[0] + ".jsonl",
                    "rewarding": options,
                }
            )
            return accuracies(read_rows(data), read_rows(run_rewarding(recipe)))

        return kept(file, measured)

    def train(self, method: Method, pairs: int, rate: str, output: str) -> str:
        """The folder of a reward model that has learned from so many pairs."""
        settings = [
            f"seed={self.seed}",
            f"output={output}",
            f"data.path={self.first_pairs(self.data(method.data, 'align'), pairs)}",
            f"training.optimizer.learning_rate={rate}",
            f"training.max_steps={self.steps}",
            f"training.epochs={self.steps}",  # more than are needed
            "validation=null",
        ]
        path = os.path.join(CONFIGS, f"{method.recipe}.yaml")
        return run_training(load_recipe(TrainRecipe, path, settings))

    def data(self, name: str, split: str) -> str:
        """A file of rankings of a split, which is made where it is not there."""
        folder = os.path.join(self.folder, split)
        rankings, terse = (os.path.join(folder, file) for file in (RANKINGS, TERSE))
        if not os.path.exists(terse):
            make_preferences(folder, self.prompts[split], self.seed, split)
            write_rows(terse, [with_verdicts(row) for row in read_rows(rankings)])
        return os.path.join(folder, name)

    def first_pairs(self, path: str, pairs: int) -> str:
        """A file of the first rows that have as many pairs together, or all of them."""
        rows = read_rows(path)
        have = itertools.accumulate(len(ordered(row)) for row in rows)
        taken = sum(number < pairs for number in have) + 1
        first = f"{os.path.splitext(path)[0]}-{pairs}.jsonl"
        write_rows(first, rows[:taken])
        return first


def try_rates(
    runs: Runs, methods: Sequence[str], rates: Sequence[str], pairs: int
) -> tuple[dict[str, list[Result]], dict[str, str]]:
    """(figures of every try, the learning rate that is taken for each method)."""
    tries, chosen = {}, {}
    for name in methods:
        reading = next(iter(METHODS[name].readings))
        found = {rate: runs.measure(name, pairs, rate, reading, "validation") for rate in rates}
        for rate, result in found.items():
            tries[named(name, rate)] = [result]
            print(f"try {row(named(name, rate), [result], COLUMNS)}", flush=True)
        chosen[name] = max(rates, key=lambda rate: found[rate]["acc"])
    return tries, chosen


def accuracies(rankings: Rankings, rewarded: Rankings) -> Result:
    """Share of pairs, and of prompts all of whose pairs, that rewards have in order."""
    right = [
        [rewards["rewards"][better] > rewards["rewards"][worse] for better, worse in ordered(row)]
        for row, rewards in zip(rankings, rewarded, strict=True)
    ]
    return {
        "acc": float(np.mean([one for of_row in right for one in of_row])),
        "acc_plus": float(np.mean([all(of_row) for of_row in right])),
    }


def ordered(ranking: Mapping[str, Any]) -> list[tuple[int, int]]:
    """(better, worse): the places of every two captions of different ranks."""
    ranks = [response["rank"] for response in ranking["responses"]]
    places = itertools.permutations(range(len(ranks)), 2)
    return [(better, worse) for better, worse in places if ranks[better] < ranks[worse]]


def with_verdicts(ranking: Mapping[str, Any]) -> Mapping[str, Any]:
    """A row whose critiques are what they end with."""
    responses = [
        {**response, "critique": verdict(round(-response["scores"]["score"]))}
        for response in ranking["responses"]
    ]
    return {**ranking, "responses": responses}


def read_rows(path: str) -> list[dict[str, Any]]:
    with open(path) as lines:
        return [json.loads(line) for line in lines]


def named(*parts: str) -> str:
    return ", ".join(filter(None, parts))


def _words(name: str) -> str:
    return "".join(letter if letter.isalnum() else "_" for letter in name)


if __name__ == "__main__":
    main()
