"""Methods with each other on the picture world, each with the same learning rates to try.

With the first seed every method tries all rates on scenes of the split `validation`, and is given
the one that hallucinates least and loses no more than `MOST_LOST`. With that it is trained for
every seed and measured on the split `test`. A run that is finished is not repeated: each has a JSON
file.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence

from objective_results import COLUMNS, CONFIGS, START, Bench, Result, row, table

from mmpo_jax.cli import start_jax

MOST_LOST = {"sampled/recall": 0.01, "yes_no_accuracy": 0.002}
"""What a learning rate may lose of the start model's figures to be taken."""
LEAST = "sampled/chair_s"
"""What it is taken for."""
SHOWN = [column for column in COLUMNS if column[0] != "seconds"]
"""Columns. On the second split nothing is trained any more, so seconds would say nothing."""


@dataclasses.dataclass(frozen=True)
class Method:
    """A recipe and what it learns from."""

    recipe: str
    """Its file in configs, without its ending."""
    data: str | None = None
    """File of a seed's data, without its ending; None for the recipe's own."""
    overrides: tuple[str, ...] = ()
    rewards: str | None = None
    """File of a seed's data with the rewards that are the responses' scores."""
    rate_of: str | None = None
    """The method whose learning rate it takes, in place of tries of its own."""
    teacher: str | None = None
    """The method whose result with the same seed teaches it."""


Methods = Mapping[str, Method]


def parse_options(
    description: str | None,
    output: str,
    methods: Methods,
    rates: Sequence[str] = ("4e-3", "8e-3", "1.6e-2"),
) -> argparse.Namespace:
    """The command line, which is the same for all comparisons.

    Args:
      description: of the script.
      output: the default of its folder.
      methods: that can be chosen.
      rates: the learning rates to try, by default.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rates", nargs="+", default=list(rates))
    parser.add_argument("--methods", nargs="+", choices=methods, default=list(methods))
    parser.add_argument("--prompts", type=int, default=1000)
    parser.add_argument("--scenes", type=int, default=500, help="that a model is measured on")
    parser.add_argument("--output", default=output)
    parser.add_argument("--set", nargs="+", default=[], metavar="key=value", help="of all recipes")
    return parser.parse_args()


def compare(
    options: argparse.Namespace, methods: Methods, make_files: Callable[[Bench], None]
) -> None:
    """Tries the rates, runs all methods with all seeds, and prints a table of either.

    Args:
      options: of `parse_options`.
      methods: by name.
      make_files: writes what the methods need of a seed's data beside its preferences, where it is
        not there.
    """
    start_jax()
    test: dict[str, list[Result]] = {}
    tries: dict[str, list[Result]] = {}
    chosen: dict[str, str] = {}
    for seed in options.seeds:
        bench = Bench(os.path.join(options.output, f"seed-{seed}"), seed, options.prompts)
        make_files(bench)
        runs = Runs(bench, methods, options.scenes, options.set, chosen)
        if not chosen:
            tries = try_rates(runs, options.methods, options.rates)
        for name in (START, *options.methods):
            result = runs.measure(name, chosen.get(name, ""), "test")
            test.setdefault(named(name, chosen.get(name, "")), []).append(result)
            print(f"seed {seed} {row(name, [result], SHOWN)}", flush=True)
    print(f"\nlearning rates, seed {options.seeds[0]}, validation:\n{table(tries, SHOWN)}")
    print(f"\ntest:\n{table(test, SHOWN)}")


@dataclasses.dataclass(frozen=True)
class Runs:
    """The runs of one seed."""

    bench: Bench
    methods: Methods
    scenes: int
    """Scenes that a model is measured on."""
    overrides: Sequence[str]
    """Of all recipes."""
    chosen: dict[str, str]
    """The learning rate that is taken for each method, as far as that is known."""

    def measure(self, name: str, rate: str, split: str) -> Result:
        """The figures of a method at a learning rate, or of the start model, on a split."""
        scenes = {"split": split, "size": self.scenes}
        evaluation = self.bench.evaluation.model_copy(update=scenes)
        if name == START:
            return self.bench.measured(START, evaluation)
        method = self.methods[name]
        overrides = [*method.overrides, f"training.optimizer.learning_rate={rate}"]
        if method.rewards is not None:
            overrides.append(f"data.rewards={os.path.join(self.bench.data, method.rewards)}")
        if method.teacher is not None:
            taught_by = folder_name(method.teacher, self.chosen[method.teacher])
            result = os.path.join(self.bench.folder, taught_by, "model")
            overrides.append(f"training.teacher.model={result}")
        return self.bench.measured(
            folder_name(name, rate),
            evaluation,
            os.path.join(CONFIGS, f"{method.recipe}.yaml"),
            None if method.data is None else f"{method.data}.jsonl",
            [*overrides, *self.overrides],
        )


def try_rates(runs: Runs, methods: Sequence[str], rates: Sequence[str]) -> dict[str, list[Result]]:
    """Figures of every try; what is taken goes into `Runs.chosen`."""
    start = runs.measure(START, "", "validation")
    tries, chosen = {START: [start]}, runs.chosen
    for name in methods:
        trying = runs.methods[name].rate_of or name
        if trying not in chosen:
            found = {rate: runs.measure(trying, rate, "validation") for rate in rates}
            for rate, result in found.items():
                tries[named(trying, rate)] = [result]
                print(f"try {row(named(trying, rate), [result], SHOWN)}", flush=True)
            chosen[trying] = best_rate(found, start)
        chosen[name] = chosen[trying]
    return tries


def best_rate(found: Mapping[str, Result], start: Result) -> str:
    """The learning rate that hallucinates least of those that lose little, or the one that loses
    least, measured by what it may."""

    def lost(rate: str) -> float:
        return max((start[key] - found[rate][key]) / most for key, most in MOST_LOST.items())

    allowed = [rate for rate in found if lost(rate) <= 1]
    if not allowed:
        return min(found, key=lost)
    return min(allowed, key=lambda rate: found[rate][LEAST])


def folder_name(name: str, rate: str) -> str:
    """Of the runs of a method at a learning rate."""
    words = "".join(letter if letter.isalnum() else "_" for letter in name)
    return f"{words}-{rate}"


def named(name: str, rate: str) -> str:
    return f"{name}, {rate}" if rate else name
