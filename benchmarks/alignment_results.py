"""The quick start over several seeds: mean and spread of every round's held-out metrics.

    python benchmarks/alignment_results.py --seeds 0 1 2 --output runs/results

prints a Markdown table, the one in docs/results.md, and says whether the goals are met.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time

from mmpo_jax.alignment.align import run_alignment
from mmpo_jax.alignment.report import RoundReport
from mmpo_jax.picture_world.language import QUESTION_KINDS
from mmpo_jax.recipes.align_recipe import AlignRecipe
from mmpo_jax.recipes.files import load_recipe

WORLD = "picture_world/"
"""What names of its metrics begin with in a run."""
ROWS = (
    ("sampled/chair_s", "CHAIR_s, sampled"),
    ("greedy/chair_s", "CHAIR_s, greedy"),
    ("sampled/chair_i", "CHAIR_i, sampled"),
    ("greedy/chair_i", "CHAIR_i, greedy"),
    ("sampled/recall", "recall, sampled"),
    ("greedy/recall", "recall, greedy"),
    ("sampled/mean_length", "words, sampled"),
    ("greedy/mean_length", "words, greedy"),
    ("yes_no_accuracy", "yes/no accuracy"),
    *((f"yes_no/{kind}", f"of {kind}") for kind in QUESTION_KINDS),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", default="configs/picture_world_align.yaml")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", default="runs/results")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_args()
    runs: list[list[RoundReport]] = []
    for seed in options.seeds:
        # The seed moves the prompts, the samples, the pairs and the order of training.
        overrides = [
            f"seed={seed}",
            f"data.seed={seed}",
            f"evaluation.seeds=[{seed}]",
            f"output={os.path.join(options.output, f'seed-{seed}')}",
            *options.overrides,
        ]
        started = time.perf_counter()
        runs.append(run_alignment(load_recipe(AlignRecipe, options.recipe, overrides)))
        print(f"seed {seed}: {time.perf_counter() - started:.0f} s", flush=True)
    print(table(runs))
    print()
    for goal, met in goals(runs):
        print(f"{'met   ' if met else 'MISSED'}  {goal}")


def table(runs: list[list[RoundReport]]) -> str:
    """Mean (standard deviation) over the runs, a column per round."""
    rounds = range(len(runs[0]))
    heads = ["", *("start" if index == 0 else f"round {index}" for index in rounds)]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for key, name in ROWS:
        digits = 4 if key == "yes_no_accuracy" else 3  # which hardly moves
        values = [[run[index].metrics[WORLD + key] for run in runs] for index in rounds]
        cells = [_spread(of_round, digits) for of_round in values]
        lines.append("| " + " | ".join([name, *cells]) + " |")
    for key, name in (("pairs", "pairs"), ("rejected_claims", "rejected claims")):
        values = [[run[index].value(key) for run in runs] for index in rounds if index]
        lines.append("| " + " | ".join([name, "", *(_spread(v, 0) for v in values)]) + " |")
    return "\n".join(lines)


def goals(runs: list[list[RoundReport]]) -> list[tuple[str, bool]]:
    """(goal with the figures, met) for the means over the runs."""
    start, end = (
        {key: statistics.fmean(run[index].metrics[WORLD + key] for run in runs) for key, _ in ROWS}
        for index in (0, -1)
    )

    def compare(text: str, before: float, after: float, met: bool) -> tuple[str, bool]:
        return f"{text}: {before:.4f} -> {after:.4f}", met

    found = []
    for decoding, lost in (("sampled", 0.02), ("greedy", 0.03)):
        chair, recall = f"{decoding}/chair_s", f"{decoding}/recall"
        third = end[chair] <= start[chair] / 3
        kept = end[recall] >= start[recall] - lost
        found.append(
            compare(f"{decoding} CHAIR_s at most a third", start[chair], end[chair], third)
        )
        found.append(
            compare(f"{decoding} recall lost at most {lost}", start[recall], end[recall], kept)
        )
    before, after = start["yes_no_accuracy"], end["yes_no_accuracy"]
    return [*found, compare("yes/no accuracy not worse", before, after, after >= before)]


def _spread(values: list[float], digits: int) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.fmean(values):.{digits}f} ({deviation:.{digits}f})"


if __name__ == "__main__":
    main()
