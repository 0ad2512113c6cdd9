"""What each dtype of saved weights keeps of a training, from a narrow start.

    python benchmarks/saved_precision.py --model FOLDER --data pairs.jsonl --output runs/saved

trains full weights and LoRA with every number of steps and learning rate given, saves each run in
every dtype, and compares the DPO margin that `mmpo score` finds of the saved folder with that of
the run itself (its folder named as the model), both against the start, over all rows. Started
again it goes on.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
from typing import get_args

import yaml

from mmpo_jax.recipes.training import SaveDtype

BETA = 0.1
SURVIVED = re.compile(r"([\d.]+%) of the update is in the saved weights")


def main() -> None:
    options = parse()
    start = log_probs(options, options.model, "start")
    print("| run | saved as | update kept | margin | of the run's |\n|---|---|---|---|---|")
    for kind, steps, rate in itertools.product(options.kinds, options.steps, options.rates):
        run = os.path.join(options.output, f"{kind}-{steps}-{rate:g}")
        train(options, run, kind, steps, rate)
        of_run = margin(log_probs(options, run, f"{os.path.basename(run)}-run"), start)
        print(f"| {kind}, {steps} steps of {rate:g} | not saved | | {of_run:.5f} | |", flush=True)
        for dtype in options.dtypes:
            folder = os.path.join(run, dtype)
            kept = convert(run, folder, dtype)
            name = f"{os.path.basename(run)}-{dtype}"
            saved = margin(log_probs(options, folder, name), start)
            print(f"| | {dtype} | {kept} | {saved:.5f} | {saved / of_run:.1%} |", flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", required=True, help="Hugging Face folder, such as of bfloat16")
    parser.add_argument("--data", required=True, help="JSONL of preference pairs")
    parser.add_argument("--output", required=True, help="folder of runs and scores")
    parser.add_argument("--steps", type=int, nargs="+", default=[24, 240])
    parser.add_argument("--rates", type=float, nargs="+", default=[5e-7, 5e-6])
    parser.add_argument("--kinds", nargs="+", default=["full", "lora"], choices=("full", "lora"))
    parser.add_argument("--dtypes", nargs="+", default=list(get_args(SaveDtype)))
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--prompt", type=int, nargs="+", default=[128], help="bucket sizes")
    parser.add_argument("--response", type=int, nargs="+", default=[256], help="bucket sizes")
    return parser.parse_args()


def lengths(options: argparse.Namespace) -> dict[str, list[int]]:
    return {"prompt": options.prompt, "response": options.response}


def train(options: argparse.Namespace, run: str, kind: str, steps: int, rate: float) -> None:
    recipe = {
        "output": run,
        "model": options.model,
        "data": {"source": "file", "path": options.data, "max_skipped": 0.9},
        "lengths": lengths(options),
        "training": {
            "objective": {"type": "dpo", "beta": BETA},
            "optimizer": {"learning_rate": rate},
            "lora": {"rank": 16, "alpha": 32} if kind == "lora" else None,
            "epochs": 10,
            "max_steps": steps,
            "batch_size": options.batch_size,
            "log_every": 4,
            "save_every": 40,
            "keep_checkpoints": 1,
        },
    }
    os.makedirs(options.output, exist_ok=True)
    with open(f"{run}.yaml", "w") as file:
        yaml.safe_dump(recipe, file)
    mmpo("train", f"{run}.yaml")


def convert(run: str, folder: str, dtype: str) -> str:
    """Saves a run in a dtype; the share of the update that is left, as the command says it."""
    if not os.path.exists(folder):
        told = mmpo("convert", run, folder, "--dtype", dtype)
        with open(f"{folder}.log", "w") as file:
            file.write(told)
    with open(f"{folder}.log") as file:
        found = SURVIVED.search(file.read())
    if found:
        return found[1]
    return "100%" if dtype == "float32" else "?"  # where its start was not found


def log_probs(options: argparse.Namespace, model: str, name: str) -> dict[str, list[float]]:
    """Row id -> log-probs of the chosen and the rejected response, computed in float32."""
    target = os.path.join(options.output, f"{name}.jsonl")
    if not os.path.exists(target):
        mmpo(
            *("score", "--model", model, "--data", options.data, "--output", target),
            *("scoring.compute_dtype=float32", "data.max_skipped=0.9"),
            f"lengths={json.dumps(lengths(options))}",
        )
    with open(target) as file:
        return {row["id"]: row["logps"] for row in map(json.loads, file)}


def margin(policy: dict[str, list[float]], start: dict[str, list[float]]) -> float:
    """The mean over rows of beta times how far the chosen response gained on the rejected one."""
    gains = [
        BETA * ((policy[row][0] - first[0]) - (policy[row][1] - first[1]))
        for row, first in start.items()
    ]
    return sum(gains) / len(gains)


def mmpo(*arguments: str) -> str:
    """Runs a command; what it says in the log."""
    done = subprocess.run(
        [sys.executable, "-m", "mmpo_jax.cli", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    if done.returncode:
        sys.exit(done.stderr)
    return done.stderr


if __name__ == "__main__":
    main()
