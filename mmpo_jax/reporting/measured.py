"""What runs were measured to be, round by round, and together where they differ in seed alone."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from mmpo_jax.reporting.charts import Chart, Line, Point
from mmpo_jax.reporting.runs import Kind, RunFiles

VARIANTS = ("sampled", "greedy")
"""Decodings that stand in front of the names of metrics."""
NOTES = {"more": "higher is better", "less": "lower is better", None: ""}


@dataclasses.dataclass(frozen=True)
class Group:
    """A run, or several that differ in seed alone."""

    name: str
    runs: Sequence[int]
    """Their numbers on the page."""

    @property
    def label(self) -> str:
        """Its name, and how many seeds it has."""
        return f"{self.name} ({len(self.runs)} seeds)" if len(self.runs) > 1 else self.name


@dataclasses.dataclass(frozen=True)
class Value:
    """A metric of a group at some place."""

    values: Sequence[float]
    """Of every run that has it."""
    start: float | None
    """The mean of the start model; None where nobody measured it, and of the start itself."""

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def deviation(self) -> float | None:
        """The standard deviation of the runs (n - 1 below); None of one."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None


@dataclasses.dataclass(frozen=True)
class Metric:
    """A metric of a benchmark, and its values."""

    name: str
    better: str | None
    """`more` or `less`; None where neither is."""
    panel: str
    """Title of its chart among those in front; empty where the benchmark names none."""
    values: Mapping[tuple[int, int], Value]
    """By the numbers of group and round, or update."""

    def verdict(self, value: Value) -> str:
        """`better`, `worse` or nothing, against the start."""
        if self.better is None or value.start is None or math.isclose(value.mean, value.start):
            return ""
        way = "more" if value.mean > value.start else "less"
        return "better" if way == self.better else "worse"


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """The metrics of a benchmark, in runs of one kind."""

    name: str
    kind: Kind
    metrics: Sequence[Metric]
    columns: Sequence[tuple[int, int]]
    """Numbers of group and round, or update, of which there are values."""


def group_runs(runs: Sequence[RunFiles]) -> list[Group]:
    """Runs that differ in seed alone, together."""
    together: dict[object, list[int]] = {}
    for number, run in enumerate(runs):
        recipe = run.recipe_but_seed
        together.setdefault(number if recipe is None else recipe, []).append(number)
    return [Group(_shared_name([runs[n].name for n in each]), each) for each in together.values()]


def _shared_name(names: Sequence[str]) -> str:
    """What names begin with, without the number or word at which they part; all of them where that
    is nothing."""
    if len(names) == 1:
        return names[0]
    shared = ""
    for letters in zip(*names, strict=False):
        if len(set(letters)) > 1:
            break
        shared += letters[0]
    shared = shared.rstrip("-_. /")
    for ending in ("seed", "s"):
        if shared.endswith(("-" + ending, "_" + ending, "/" + ending)):
            shared = shared[: -len(ending)].rstrip("-_. /")
    return shared or ", ".join(names)


def measured(runs: Sequence[RunFiles], groups: Sequence[Group]) -> list[Benchmark]:
    """All benchmarks of all runs, those of alignments and of trainings apart."""
    found: dict[tuple[str, Kind], dict[str, dict[tuple[int, int], list[float]]]] = {}
    shown: dict[str, Mapping[str, Any]] = {}
    for number, group in enumerate(groups):
        for run in (runs[n] for n in group.runs):
            shown |= run.shown
            for one in run.measurements:
                for key, value in one.values.items():
                    benchmark = key.partition("/")[0]
                    cells = found.setdefault((benchmark, run.kind), {}).setdefault(key, {})
                    cells.setdefault((number, one.place), []).append(value)
    benchmarks = []
    for (name, kind), by_key in found.items():
        order = [key for key in shown if key in by_key]
        order += [key for key in by_key if key not in shown]
        metrics = [_metric(key, by_key[key], shown.get(key)) for key in order]
        columns = sorted({column for metric in metrics for column in metric.values})
        benchmarks.append(Benchmark(name, kind, metrics, columns))
    return benchmarks


def _metric(
    key: str, cells: Mapping[tuple[int, int], list[float]], shown: Mapping[str, Any] | None
) -> Metric:
    """A metric by its key, `BENCHMARK/METRIC`, and what is known of it."""
    starts = {group: statistics.fmean(of) for (group, place), of in cells.items() if not place}
    values = {
        (group, place): Value(of, starts.get(group) if place else None)
        for (group, place), of in cells.items()
    }
    known: Mapping[str, Any] = shown or {}
    name = key.partition("/")[2]
    return Metric(name, known.get("better"), known.get("panel", ""), values)


def chart_benchmark(
    benchmark: Benchmark, groups: Sequence[Group]
) -> tuple[list[Chart], list[Chart]]:
    """(charts that the benchmark names, all others) over rounds or updates; a line for every group
    and metric of a chart."""
    panels: dict[str, list[Metric]] = {}
    for metric in benchmark.metrics:
        variant, _, base = metric.name.partition("/")
        title = metric.panel or (base if variant in VARIANTS else metric.name)
        panels.setdefault(title, []).append(metric)
    drawn = {title: _chart(title, of, benchmark, groups) for title, of in panels.items()}
    named = {metric.panel for metric in benchmark.metrics} - {""}
    front = [chart for title, chart in drawn.items() if title in named or not named]
    return front, [chart for title, chart in drawn.items() if named and title not in named]


def _chart(
    title: str, metrics: Sequence[Metric], benchmark: Benchmark, groups: Sequence[Group]
) -> Chart:
    alone = len({group for group, _ in benchmark.columns}) == 1
    lines = []
    for dash, metric in enumerate(metrics):
        variant, _, base = metric.name.partition("/")
        own = variant if base and variant in VARIANTS else metric.name
        for number, group in enumerate(groups):
            of_group = [(place, v) for (of, place), v in metric.values.items() if of == number]
            points = [_point(place, value) for place, value in sorted(of_group)]
            if points:
                names = [*([] if alone else [group.label]), *([own] if len(metrics) > 1 else [])]
                line = Line(", ".join(names) or title, points, dash if alone else number, dash)
                lines.append(line)
    by_round = benchmark.kind == "align"
    x_name = "round" if by_round else "update"
    return Chart(title, NOTES[metrics[0].better], lines, x_name, whole_x=by_round)


def _point(index: int, value: Value) -> Point:
    if len(value.values) == 1:
        return Point(index, value.mean)
    return Point(index, value.mean, min(value.values), max(value.values))
