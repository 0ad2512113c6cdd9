"""Runs as `mmpo align`, `mmpo train` and `mmpo evaluate` leave them, finished or not."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from mmpo_jax.core.buckets import absolute, entries, is_file, is_folder
from mmpo_jax.core.errors import DataError, MmpoError
from mmpo_jax.core.files import (
    canonical_json,
    check_reachable,
    null_if_not_finite,
    read_bytes,
    read_json,
    write_atomic,
)
from mmpo_jax.core.timings import rates, read_timings
from mmpo_jax.training.metrics import FILE as METRICS
from mmpo_jax.training.metrics import read_metrics

RECIPE = "recipe.json"
"""In an alignment's folder: its recipe, but for `output`."""
CARD = os.path.join("base", "card.json")
"""In a training's folder: the card of its result, which holds the recipe."""
EVALUATION = "evaluation.json"
ROUNDS = "rounds.json"
ANSWERS = "evaluation"
"""In a round's folder, or a training's, there by step: what benchmarks asked, and their scores."""
TAX = "tax.json"
TRAINED = "train.json"
"""In a round's folder: what is known of its training, once that is over."""
DPO_UPDATES = 10
"""Updates before the steps whose accuracy and margin runs warn of: earlier ones have hardly
moved the model, and before the first there is nothing but rounding."""
DPO_LOSS = 1e-3
"""Margin, below 0, from which on runs warn of it; less is rounding."""
_ROUND = re.compile(r"round-(\d+)")
_PARTS = re.compile(r"(.+)\.parts(-.*)?")

Kind = Literal["align", "train", "evaluate"]


@dataclasses.dataclass(frozen=True)
class Round:
    """What a round left, or a training by itself; number 0 is the start model."""

    index: int
    folder: str
    counts: Mapping[str, Any]
    """Its line of `rounds.json`; empty where it is not over."""
    curves: Sequence[Mapping[str, float]]
    """The lines of its training's metrics, by step."""
    stages: Mapping[str, Mapping[str, float | None]]
    """What each stage took: seconds, rows, rows_per_second, tokens_per_second."""


@dataclasses.dataclass(frozen=True)
class Measurement:
    """What benchmarks say of a model of a run."""

    place: int
    """Number of the round or, in a training, of the update; 0 is the start model."""
    values: Mapping[str, float]
    """By `BENCHMARK/METRIC`."""
    folder: str
    """Folder of its answers and their scores."""


@dataclasses.dataclass(frozen=True)
class RunFiles:
    """A run as its folder has it."""

    folder: str
    name: str
    """How the page calls it."""
    kind: Kind
    recipe: Mapping[str, Any]
    """All of its recipe but where it wrote; empty where nobody knows."""
    rounds: Sequence[Round]
    measurements: Sequence[Measurement]
    shown: Mapping[str, Mapping[str, Any]]
    """Of metrics by `BENCHMARK/METRIC`: `benchmark`, `heading`, `better`, `format`."""
    tax: Mapping[str, Any]
    """What the run gained and lost, see `evaluation.tax`; empty where nobody knows."""
    is_finished: bool
    state: str
    """How far it came, in words."""

    @property
    def seed(self) -> int | None:
        return self.recipe.get("seed")

    @property
    def recipe_but_seed(self) -> str | None:
        """What runs share that differ in seed alone; None where the recipe is not known."""
        rest = {key: value for key, value in self.recipe.items() if key != "seed"}
        return canonical_json([self.kind, null_if_not_finite(rest)]) if rest else None


def save_recipe(folder: str, recipe: Mapping[str, Any]) -> None:
    """Writes the recipe of an alignment, which holds no path of its output, for pages to read."""
    text = json.dumps(null_if_not_finite(recipe), indent=1, ensure_ascii=False)
    write_atomic(os.path.join(folder, RECIPE), text.encode())


def read_runs(folders: Sequence[str]) -> list[RunFiles]:
    """The runs of some folders, under names that tell them apart.

    Raises:
      MmpoError: one of them is no run.
    """
    names = _names([absolute(folder) for folder in folders])
    return [read_run(folder, name) for folder, name in zip(folders, names, strict=True)]


def _names(folders: Sequence[str]) -> list[str]:
    """The ends of paths, of as many parts as it takes that no two are alike."""
    parts = [re.split(r"[/\\]+", folder.partition("://")[2] or folder) for folder in folders]
    for size in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-size:]) for part in parts]
        if len(set(names)) == len(set(folders)):
            break
    return names


def read_run(folder: str, name: str) -> RunFiles:
    """
    Raises:
      MmpoError: the folder is none, or no run's.
    """
    check_reachable(folder)
    if not is_folder(folder):
        raise MmpoError(f"{folder}: there is no such folder")
    there = entries(folder)
    indices = sorted(int(found[1]) for each in there if (found := _ROUND.fullmatch(each)))
    if indices or RECIPE in there:
        return _read_alignment(folder, name, indices)
    if METRICS in there or is_file(os.path.join(folder, CARD)):
        return _read_training(folder, name, there)
    if EVALUATION in there:
        return _read_evaluation(folder, name)
    raise MmpoError(
        f"{folder}: is no run: it has neither rounds, which `mmpo align` leaves, nor {METRICS}, "
        f"which `mmpo train` does, nor {EVALUATION}, which `mmpo evaluate` does"
    )


def _read_alignment(folder: str, name: str, indices: Sequence[int]) -> RunFiles:
    recipe = read_json(os.path.join(folder, RECIPE))
    counts = {row["index"]: row for row in _read_list(os.path.join(folder, ROUNDS))}
    rounds = []
    for index in indices:
        place = os.path.join(folder, f"round-{index}")
        rounds.append(
            Round(
                index,
                place,
                counts.get(index, {}),
                read_curves(os.path.join(place, "train", METRICS)),
                stage_rates(place),
            )
        )
    told = [read_json(os.path.join(one.folder, EVALUATION)) for one in rounds]
    measurements = [
        Measurement(one.index, _finite(each["metrics"]), os.path.join(one.folder, ANSWERS))
        for one, each in zip(rounds, told, strict=True)
        if each.get("metrics")
    ]
    shown = {one["key"]: one for each in told for one in each.get("shown", [])}
    over = max(counts, default=0)
    planned = recipe.get("rounds")
    is_finished = is_file(os.path.join(folder, "model.json")) and over == (planned or over)
    if is_finished:
        state = f"finished: {_count(over, 'round')}"
    else:
        state = f"not finished: {_progress(rounds, over, planned)}"
    return RunFiles(
        folder,
        name,
        "align",
        recipe,
        rounds,
        measurements,
        shown,
        read_json(os.path.join(folder, TAX)),
        is_finished,
        state,
    )


def _progress(rounds: Sequence[Round], over: int, planned: int | None) -> str:
    """How far an alignment came, in words."""
    of = "" if planned is None else f" of {planned}"
    begun = next((one for one in rounds if one.index == over + 1), None)
    if begun is None:
        if over:
            return f"{_count(over, 'round')}{of} done"
        return "the start model is measured" if rounds else "nothing is done yet"
    there = entries(begun.folder)
    making = next((_PARTS.fullmatch(each) for each in there if _PARTS.fullmatch(each)), None)
    if TRAINED in there:
        what = "trained, not measured yet"
    elif begun.curves:
        what = f"training, {int(begun.curves[-1]['step'])} updates done"
    elif making is not None:
        parts = len(entries(os.path.join(begun.folder, making[0])))
        what = f"{making[1]}, {_count(parts, 'part')} made"
    else:
        done = [each.removesuffix(".parquet") for each in there if each.endswith(".parquet")]
        done.sort(key=[*begun.stages, *done].index)  # in which they were made
        what = f"{done[-1]} done" if done else "begun"
    return f"round {begun.index}{of}: {what}"


def _read_training(folder: str, name: str, there: Sequence[str]) -> RunFiles:
    recipe = read_json(os.path.join(folder, CARD)).get("recipe", {})
    curves = read_curves(os.path.join(folder, METRICS))
    updates = _count(int(curves[-1]["step"]) if curves else 0, "update")
    is_finished = any(each in there for each in ("model", "adapter"))
    state = f"finished: {updates}" if is_finished else f"not finished: {updates} done"
    tax = read_json(os.path.join(folder, TAX))
    shown = {f"{row['benchmark']}/{row['metric']}": row for row in tax.get("rows", [])}
    asked = [one.get("name") or one.get("type") for one in recipe.get("evaluation") or ()]
    names = {*asked, *(row["benchmark"] for row in shown.values())}  # the table comes at the end
    benchmarks = tuple(f"{name}/" for name in names)
    measurements, rest = [], []
    for row in curves:
        values = {key: value for key, value in row.items() if key.startswith(benchmarks)}
        if values:
            step = int(row["step"])
            place = os.path.join(folder, ANSWERS, f"step-{step:06d}")
            measurements.append(Measurement(step, values, place))
        rest.append({key: value for key, value in row.items() if key not in values})
    one = Round(1, folder, {}, rest, stage_rates(folder))
    return RunFiles(
        folder, name, "train", recipe, [one], measurements, shown, tax, is_finished, state
    )


def _read_evaluation(folder: str, name: str) -> RunFiles:
    told = read_json(os.path.join(folder, EVALUATION))
    one = Round(0, folder, {}, [], stage_rates(folder))
    measured = Measurement(0, _finite(told.get("metrics", {})), folder)
    shown = {each["key"]: each for each in told.get("shown", [])}
    recipe = told.get("recipe", {})
    return RunFiles(
        folder, name, "evaluate", recipe, [one], [measured], shown, {}, True, "finished"
    )


def _finite(values: Mapping[str, float | None]) -> dict[str, float]:
    return {k: x for k, x in values.items() if x is not None and math.isfinite(x)}


def read_curves(path: str) -> list[dict[str, float]]:
    """The lines of a `metrics.jsonl`, a step each; what is not finite is left out."""
    rows = {row["step"]: row for row in read_metrics(path) if "step" in row}
    return [
        {name: value for name, value in rows[step].items() if math.isfinite(value)}
        for step in sorted(rows)
    ]


def stage_rates(folder: str) -> dict[str, dict[str, float | None]]:
    """What the stages of a folder took, over all runs of it and in all of its folders.

    Returns:
      By the stage's name: `seconds`, `rows`, `rows_per_second` and `tokens_per_second`, None where
      a stage has no such thing.
    """
    found: dict[str, dict[str, float | None]] = {}
    for place in ("", *entries(folder)):
        for name, took in read_timings(os.path.join(folder, place)).items():
            rate = rates(took)
            found[os.path.join(place, name)] = {
                "seconds": took["seconds"],
                "rows": took.get("rows"),
                "rows_per_second": rate.get("rows"),
                "tokens_per_second": rate.get("tokens"),
            }
    return found


def training_warnings(index: int, counts: Mapping[str, Any]) -> list[str]:
    """What a person should know of a round's training.

    Args:
      index: of the round.
      counts: its line of `rounds.json`.
    """
    names = ("accuracy", "margin", "updates")
    accuracy, margin, updates = (counts.get(f"dpo_{name}") for name in names)
    if accuracy is None or margin is None or updates is None:
        return []
    if accuracy >= 0.5 or margin >= -DPO_LOSS or updates < DPO_UPDATES:
        return []
    return [f"round {index}: DPO prefers the rejected responses; it did not learn"]


def _read_list(path: str) -> list[dict[str, Any]]:
    try:
        rows = json.loads(read_bytes(path)) if is_file(path) else []
    except (ValueError, DataError):
        return []
    return [row for row in rows if isinstance(row, dict) and "index" in row]


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
