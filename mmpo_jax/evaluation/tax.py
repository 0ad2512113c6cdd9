"""The alignment tax: what a run gained and lost on everything that was measured, in one table.

`tax.json` of a run, in which null stands for what is not defined:

    {"compared": ["start", "round 1", "round 2"],  whose values follow, the start model's first
     "result": "round 2",                          which of them is the run's model
     "confidence": 0.95, "samples": 2000, "seed": 0,
     "rows": [
       {"benchmark": "picture_world",              name of its section in the recipe
        "metric": "sampled/chair_s", "heading": "CHAIR_s", "format": ".3f",
        "better": "less",                          or "more", or null
        "panel": "CHAIR_s",                        title of its curve; empty for none
        "guards": null,                            what is lost where it gets worse: "recall", ...
        "records": 500,                            that have a part in it and all of them answered
        "cells": [                                 one for each of `compared`
          {"value": 0.484, "low": 0.440, "high": 0.528},
          {"value": 0.232, "low": 0.196, "high": 0.270,
           "difference": -0.252, "difference_low": -0.301, "difference_high": -0.204,
           "p": 1.2e-19, "test": "mcnemar",        exact, or "bootstrap", paired
           "verdict": "better"},                   "worse", "more", "less" where p < 0.05, or "same"
          ...]}],
     "warnings": ["round 1: recall fell by ..."]}

Values are the benchmark's own. Intervals and tests are of pictures, where several questions are
about one: their answers are right or wrong together. Where rows of scores do not say what each adds
to a metric, it has values alone. With twenty numbers one is below 0.05 by chance: p is not
corrected for their number.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mmpo_jax.benchmarks.benchmark import PICTURE, Metric, Scores
from mmpo_jax.core.files import read_json
from mmpo_jax.evaluation.bootstrap import (
    CONFIDENCE,
    SAMPLES,
    SEED,
    Parts,
    bootstrap_p,
    interval,
    mcnemar_p,
    resampled,
    summed,
)
from mmpo_jax.evaluation.measure import Measured, Shown

FILE = "tax.json"
ALPHA = 0.05
"""p below which a difference is one."""
LEAST = {"recall": 0.01, "accuracy": 0.01, "length": 0.1}
"""Losses, as shares of the start's value, that a warning needs beside a p below `ALPHA`."""
LEAST_UNREAD = 0.02
"""Gain in the share of answers that cannot be read, likewise."""
START = "start"


@dataclasses.dataclass(frozen=True)
class Cell:
    """A metric of one of the models that are compared."""

    value: float
    low: float = math.nan
    high: float = math.nan
    difference: float = math.nan
    """From the start; NaN for the start itself, as what follows."""
    difference_low: float = math.nan
    difference_high: float = math.nan
    p: float = math.nan
    test: str | None = None
    verdict: str | None = None


def alignment_tax(
    measured: Mapping[str, Sequence[Measured]], shown: Sequence[Shown], result: str
) -> dict[str, Any]:
    """The table, in the layout above.

    Args:
      measured: what the benchmarks of a run say of every model, the start's first.
      shown: the metrics.
      result: name of the run's model among those.
    """
    names = list(measured)
    by_name = {name: {one.name: one.scores for one in of} for name, of in measured.items()}
    rows: list[dict[str, Any]] = []
    for benchmark in dict.fromkeys(one.benchmark for one in shown):
        scores = [by_name[name][benchmark] for name in names]
        metrics = [one for one in shown if one.benchmark == benchmark]
        rows += _rows(metrics, scores)
    return {
        "compared": names,
        "result": result,
        "confidence": CONFIDENCE,
        "samples": SAMPLES,
        "seed": SEED,
        "rows": rows,
        "warnings": _warnings(names, rows),
    }


def _rows(shown: Sequence[Shown], scores: Sequence[Scores]) -> list[dict[str, Any]]:
    """The rows of a benchmark, for the scores of all models."""
    tables = [_by_record(one) for one in scores]
    common = [record for record in tables[0] if all(record in table for table in tables)]
    pictures = _pictures([tables[0][record] for record in common])
    found = []
    for one in shown:
        parts = [_parts(table, common, one.metric.name) for table in tables]
        values = [_value(of_model, one.metric.name) for of_model in scores]
        cells = _cells(one.metric, values, parts, pictures)
        found.append(
            {
                "benchmark": one.benchmark,
                "metric": one.metric.name,
                "heading": one.heading,
                "format": one.metric.form,
                "better": one.metric.better,
                "guards": one.metric.guards,
                "panel": one.metric.panel,
                "records": int((parts[0] != 0).any(axis=1).sum()),
                "cells": [dataclasses.asdict(cell) for cell in cells],
            }
        )
    return found


def _by_record(scores: Scores) -> dict[tuple[str, int], Mapping[str, Any]]:
    """Rows that add to metrics, by the record's id and how often that came before."""
    seen: Counter[str] = Counter()
    table = {}
    for row in scores.rows:
        if "scores" in row:
            table[row["id"], seen[row["id"]]] = row
            seen[row["id"]] += 1
    return table


def _parts(table: Mapping[Any, Mapping[str, Any]], records: Sequence[Any], metric: str) -> Parts:
    pairs = [table[record]["scores"].get(metric, (0, 0)) for record in records]
    return np.array([x if isinstance(x, list | tuple) else (x, 1) for x in pairs], float).reshape(
        -1, 2
    )


def _pictures(rows: Sequence[Mapping[str, Any]]) -> np.ndarray | None:
    """int[N], the picture of each record; None where no two records have the same."""
    names = [row.get(PICTURE, f"record {place}") for place, row in enumerate(rows)]
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return None if len(numbers) == len(names) else np.array([numbers[name] for name in names])


def _value(scores: Scores, metric: str) -> float:
    return {**scores.beside, **scores.metrics}.get(metric, math.nan)


def _cells(
    metric: Metric, values: Sequence[float], parts: Sequence[Parts], pictures: np.ndarray | None
) -> list[Cell]:
    if not parts[0][:, 1].any():
        return [Cell(value) for value in values]
    if pictures is not None:
        parts = [summed(one, pictures) for one in parts]
    samples = resampled(parts)
    cells = [Cell(values[0], *interval(samples[0]))]
    for value, of_model, own in zip(values[1:], samples[1:], parts[1:], strict=True):
        exact = mcnemar_p(parts[0], own) if pictures is None else None
        p = bootstrap_p(of_model - samples[0]) if exact is None else exact
        low, high = interval(of_model - samples[0])
        difference = value - values[0]
        cells.append(
            Cell(
                value,
                *interval(of_model),
                difference=difference,
                difference_low=low,
                difference_high=high,
                p=p,
                test="bootstrap" if exact is None else "mcnemar",
                verdict=_verdict(metric, difference, p),
            )
        )
    return cells


def _verdict(metric: Metric, difference: float, p: float) -> str:
    if not p < ALPHA or not difference:
        return "same"
    way = "more" if difference > 0 else "less"
    return way if metric.better is None else "better" if way == metric.better else "worse"


def _warnings(names: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What a person should know: counting rejected claims rewards saying less."""
    return [
        f"{name}: {told}"
        for place, name in enumerate(names)
        if place
        for row in rows
        if (told := _warning(row, row["cells"][0]["value"], row["cells"][place]))
    ]


def _warning(row: Mapping[str, Any], start: float, cell: Mapping[str, Any]) -> str | None:
    guards, gained = row["guards"], cell["difference"]
    if guards is None or cell["verdict"] in (None, "same"):
        return None
    heading, p = row["heading"], f"p = {cell['p']:.2g}"
    if guards == "reading":
        if gained < LEAST_UNREAD:
            return None
        return (
            f"{cell['value']:.0%} of the answers cannot be read, or hold pieces that cannot "
            f"({heading}, {p}); the model is coming apart (lower the learning rate)"
        )
    if -gained < LEAST[guards] * abs(start):
        return None
    if guards == "length":
        return f"answers are {-gained / start:.0%} shorter than at the start ({heading}, {p})"
    fell = f"{heading} fell by {format(-gained, row['format'])} since the start ({p})"
    why = {
        "recall": "the model avoids errors by saying less",
        "accuracy": "the model knows less than before",
    }
    return f"{fell}; {why[guards]} (lower the learning rate or epochs)"


def read_tax(folder: str) -> dict[str, Any]:
    """The table of a run, with NaN for null among its numbers."""
    tax = read_json(os.path.join(folder, FILE))
    numbers = [f.name for f in dataclasses.fields(Cell) if f.name not in ("test", "verdict")]
    for row in tax["rows"]:
        for cell in row["cells"]:
            cell |= {name: math.nan if cell[name] is None else cell[name] for name in numbers}
    return tax


LEGEND = (
    "[95 % of bootstrap samples]  p of a paired test against the start; below "
    "0.05:  + better  - worse  * another, and neither"
)
"""Below the table."""


def render_tax(tax: Mapping[str, Any]) -> str:
    """The table for a person: values with intervals, and of the others than the start the
    difference's p; `+` what got better, `-` worse, `*` only different."""
    signs = {"better": "+", "worse": "-", "more": "*", "less": "*"}

    def cell(row: Mapping[str, Any], of: Mapping[str, Any]) -> str:
        def number(value: float) -> str:
            return "" if math.isnan(value) else format(value, row["format"])

        text = number(of["value"])
        if number(of["low"]):
            text += f" [{number(of['low'])}, {number(of['high'])}]"
        if not math.isnan(of["p"]):
            text += f" p={of['p']:.1g}{signs.get(of['verdict'], ' ')}"
        return text

    table = [["", *tax["compared"]]]
    table += [[row["heading"], *(cell(row, of) for of in row["cells"])] for row in tax["rows"]]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in table]
    return "\n".join([*(line.rstrip() for line in lines), LEGEND])
