"""nSFT against its baselines on the picture world: hallucination, and the price in answers.

    python benchmarks/nsft_results.py --seeds 0 1 2 --output runs/nsft

Of the same scenes, true data have a true caption and the worst of the model's own, own data the
best and the worst of its own. Every method gets the same learning rates to try, with the first
seed: the one that hallucinates least on scenes of the split `validation`, and loses no more than
`MOST_LOST`, is taken for all seeds, which are measured on the split `test`. Prints both tables,
those in docs/results.md. A run that is finished is not repeated: each has a JSON file.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Mapping, Sequence

import numpy as np
from objective_results import CONFIGS, START, Bench, Result, row, table
from picture_world_preferences import correct

from mmpo_jax.correction.corrections import Error, corrected
from mmpo_jax.correction.correctors import scene_of
from mmpo_jax.data.files import write_rows
from mmpo_jax.data.formats import FORMATS
from mmpo_jax.data.formats.writing import Writer
from mmpo_jax.data.readers import read_records
from mmpo_jax.data.records import Record
from mmpo_jax.picture_world.language import ANSWERS, questions

MOST_LOST = {"sampled/recall": 0.01, "yes_no_accuracy": 0.002}
"""What a learning rate may lose of the start model's figures to be taken."""
LEAST = "sampled/chair_s"
"""What it is taken for."""


@dataclasses.dataclass(frozen=True)
class Method:
    """A recipe of configs/objectives and what it learns from."""

    recipe: str
    data: str
    """File of a seed's data, without its ending."""
    overrides: tuple[str, ...] = ()


KL = ("training.objective.kl_weight=0.1", "training.reference.type=online")
METHODS = {
    "continual SFT": Method("sft", "true_pairs"),
    "GT-DPO": Method("gt_dpo", "true_pairs"),
    "nSFT": Method("nsft", "true_corrections"),
    "nSFT with KL": Method("nsft", "true_corrections", KL),
    "nSFT, questions apart": Method("nsft", "true_corrections_apart"),
    "nSFT, other questions": Method("nsft", "true_corrections_other"),
    "SFT, own captions": Method("sft", "pairs"),
    "DPO, own captions": Method("dpo", "pairs"),
    "nSFT, own captions": Method("nsft", "corrections"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rates", nargs="+", default=["4e-3", "8e-3", "1.6e-2"])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--prompts", type=int, default=1000)
    parser.add_argument("--scenes", type=int, default=500, help="that a model is measured on")
    parser.add_argument("--output", default="runs/nsft")
    parser.add_argument("--set", nargs="+", default=[], metavar="key=value", help="of all recipes")
    options = parser.parse_args()
    test: dict[str, list[Result]] = {}
    tries: dict[str, list[Result]] = {}
    chosen: dict[str, str] = {}
    for seed in options.seeds:
        runs = Runs(options.output, seed, options.prompts, options.scenes, options.set)
        if not chosen:
            tries, chosen = try_rates(runs, options.methods, options.rates)
        for name in (START, *options.methods):
            result = runs.measure(name, chosen.get(name, ""), "test")
            test.setdefault(named(name, chosen.get(name, "")), []).append(result)
            print(f"seed {seed} {row(name, [result])}", flush=True)
    print(f"\nlearning rates, seed {options.seeds[0]}, validation:\n{table(tries)}")
    print(f"\ntest:\n{table(test)}")


class Runs:
    """The runs of one seed."""

    def __init__(self, folder: str, seed: int, prompts: int, scenes: int, overrides: Sequence[str]):
        self.bench = Bench(os.path.join(folder, f"seed-{seed}"), seed, prompts)
        self.scenes, self.overrides = scenes, overrides
        make_variants(self.bench.data, seed)

    def measure(self, name: str, rate: str, split: str) -> Result:
        """The figures of a method at a learning rate, or of the start model, on a split."""
        scenes = {"split": split, "size": self.scenes}
        evaluation = self.bench.evaluation.model_copy(update=scenes)
        if name == START:
            return self.bench.measured(START, evaluation)
        method = METHODS[name]
        words = "".join(letter if letter.isalnum() else "_" for letter in name)
        result = self.bench.measured(
            f"{words}-{rate}",
            evaluation,
            os.path.join(CONFIGS, "objectives", f"picture_world_{method.recipe}.yaml"),
            f"{method.data}.jsonl",
            [*method.overrides, f"training.optimizer.learning_rate={rate}", *self.overrides],
        )
        # On the second split nothing is trained any more, so the seconds say nothing.
        return {key: value for key, value in result.items() if key != "seconds"}


def try_rates(
    runs: Runs, methods: Sequence[str], rates: Sequence[str]
) -> tuple[dict[str, list[Result]], dict[str, str]]:
    """(figures of every try, the learning rate that is taken for each method)."""
    start = runs.measure(START, "", "validation")
    tries, chosen = {START: [start]}, {}
    for name in methods:
        found = {rate: runs.measure(name, rate, "validation") for rate in rates}
        for rate, result in found.items():
            tries[named(name, rate)] = [result]
            print(f"try {row(named(name, rate), [result])}", flush=True)
        chosen[name] = best_rate(found, start)
    return tries, chosen


def best_rate(found: Mapping[str, Result], start: Result) -> str:
    """The learning rate that hallucinates least of those that lose little, or the one that loses
    least, measured by what it may."""

    def lost(rate: str) -> float:
        return max((start[key] - found[rate][key]) / most for key, most in MOST_LOST.items())

    allowed = [rate for rate in found if lost(rate) <= 1]
    if not allowed:
        return min(found, key=lost)
    return min(allowed, key=lambda rate: found[rate][LEAST])


def named(name: str, rate: str) -> str:
    return f"{name}, {rate}" if rate else name


def make_variants(data: str, seed: int) -> None:
    """Writes other forms of the corrected true pairs: with the questions apart, and with as many
    questions about the scene that have nothing to do with what was said wrong."""
    other = os.path.join(data, "true_corrections_other.jsonl")
    if os.path.exists(other):
        return
    correct(os.path.join(data, "true_pairs.jsonl"), seed, "_apart", layout="apart")
    writer = Writer(root=data, copies=os.path.join(data, "images"))
    records, _ = read_records(os.path.join(data, "true_corrections.jsonl"))
    rng = np.random.default_rng(seed)
    rows = (
        FORMATS["record"].write(other_questions(record, rng, seed), writer) for record in records
    )
    write_rows(other, rows)


def other_questions(record: Record, rng: np.random.Generator, seed: int) -> Record:
    """A corrected record with as many other questions, as many of them with the answer yes."""
    scene = scene_of(record.solution)
    assert scene is not None
    chosen, rejected = record.responses
    plain = dataclasses.replace(chosen, turns=chosen.turns[:1])
    count = (len(chosen.turns) - 1) // 2
    asked = questions(scene, rng, count)
    yes, no = ([question.text for question in asked if question.answer is a] for a in (True, False))
    errors = [Error("other", "", *pair) for pair in zip(yes, no, strict=True)]
    before = dataclasses.replace(record, responses=(plain, rejected))
    return corrected(before, errors, (ANSWERS[True], ANSWERS[False]), seed, "dialogue")


if __name__ == "__main__":
    main()
