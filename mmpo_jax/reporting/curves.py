"""Curves of training, all rounds of a run one behind the other."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from mmpo_jax.reporting.charts import Chart, Line, Point
from mmpo_jax.reporting.measured import Group
from mmpo_jax.reporting.runs import RunFiles
from mmpo_jax.training.metrics import HELD_OUT, MEASURED

MOST_POINTS = 200
"""Points of a line; of more steps each is the mean of several, in a band from least to most."""
TOGETHER = {
    "rewards/chosen": "rewards of chosen and rejected",
    "rewards/rejected": "rewards of chosen and rejected",
    "logps/chosen": "log-probs of chosen and rejected",
    "logps/rejected": "log-probs of chosen and rejected",
    "reward": "reward of samples",
    "reward_std": "reward of samples",
}
"""Metric -> chart that it shares with others."""
FIRST = (
    "loss",
    "rewards/margins",
    "rewards/accuracies",
    "rewards of chosen and rejected",
    "reward of samples",
    "log-probs of chosen and rejected",
    "lengths",
    "grad_norm",
    "learning_rate",
)
"""Charts that stand in front; the others follow, folded."""
SPEEDS = ("tokens_per_second", "rows_per_second", "step_time", "goodput")
"""The same of what is measured."""


def training_charts(
    runs: Sequence[RunFiles], groups: Sequence[Group]
) -> tuple[list[Chart], list[Chart]]:
    """(charts in front, those behind) of all metrics but the measured ones."""
    names = [name for name in _names(runs) if not name.startswith(MEASURED)]
    charts = _charts(runs, groups, names)
    front = [charts.pop(title) for title in FIRST if title in charts]
    return front, [charts[title] for title in sorted(charts)]


def speed_charts(
    runs: Sequence[RunFiles], groups: Sequence[Group]
) -> tuple[list[Chart], list[Chart]]:
    """(charts in front, those behind) of what clocks and devices said."""
    names = [name for name in _names(runs) if name.startswith(MEASURED)]
    charts = _charts(runs, groups, names)
    front = [charts.pop(name) for name in (MEASURED + each for each in SPEEDS) if name in charts]
    return front, [charts[title] for title in sorted(charts)]


def _names(runs: Sequence[RunFiles]) -> list[str]:
    rows = (row for run in runs for one in run.rounds for row in one.curves)
    return sorted({name for row in rows for name in row} - {"step"})


def _chart_of(name: str) -> str:
    """The title of the chart that a metric is in; held-out rows are with those trained on."""
    base = name.removeprefix(HELD_OUT)
    if "length" in base:
        return "lengths"
    return TOGETHER.get(base, base)


def _charts(
    runs: Sequence[RunFiles], groups: Sequence[Group], names: Sequence[str]
) -> dict[str, Chart]:
    by_title: dict[str, list[str]] = {}
    for name in names:
        by_title.setdefault(_chart_of(name), []).append(name)
    joined = {number: _joined(run) for number, run in enumerate(runs)}
    rules: list[tuple[float, str]] = []
    if len(runs) == 1:
        rules = [(start, f"round {index}") for index, start in joined[0][1].items()]
    charts = {}
    for title, of_title in by_title.items():
        lines = []
        for slot, group in enumerate(groups):
            for number in group.runs:
                rows, begins = joined[number]
                for name in of_title:
                    points = _points(rows, begins.values(), name)
                    if not points:
                        continue
                    line = Line(name, points, *_style(name, of_title))
                    if len(runs) > 1:
                        line = _of_run(line, runs[number].name, group.label, slot, of_title)
                    lines.append(line)
        if lines:
            shown = rules if len(rules) > 1 else []
            charts[title] = Chart(title, "", lines, "update", rules=shown)
    return charts


def _style(name: str, of_chart: Sequence[str]) -> tuple[int, int]:
    """(colour, dashes) of a metric where there is one run: the same colour for held-out rows."""
    bases = list(dict.fromkeys(each.removeprefix(HELD_OUT) for each in of_chart))
    return bases.index(name.removeprefix(HELD_OUT)), int(name.startswith(HELD_OUT))


def _of_run(line: Line, run: str, group: str, slot: int, of_chart: Sequence[str]) -> Line:
    """A line among those of several runs: in the colour of its group, dashed by its metric."""
    metric = f": {line.name}" if len(of_chart) > 1 else ""
    dash = 2 * line.slot + line.dash
    return Line(run + metric, line.points, slot, dash, legend=group + metric)


def _joined(run: RunFiles) -> tuple[list[Mapping[str, float]], dict[int, float]]:
    """(lines of all rounds, with steps counted on; the step at which each round begins)."""
    rows: list[Mapping[str, float]] = []
    begins: dict[int, float] = {}
    before = 0.0
    for one in run.rounds:
        if one.curves:
            begins[one.index] = before
            rows += [{**row, "step": row["step"] + before} for row in one.curves]
            before = rows[-1]["step"]
    return rows, begins


def _points(rows: Sequence[Mapping[str, float]], begins: Iterable[float], name: str) -> list[Point]:
    """The values of a metric by step, of too many the means of neighbours.

    Args:
      rows: of all rounds.
      begins: steps before the first of each round.
      name: of the metric.
    """
    found = [(row["step"], row[name]) for row in rows if name in row]
    bins = min(len(found), MOST_POINTS)
    points, ahead = [], sorted(begins)
    for place in range(bins):
        first, last = (len(found) * at // bins for at in (place, place + 1))
        steps, values = zip(*found[first:last], strict=True)
        step, mean = sum(steps) / len(steps), sum(values) / len(values)
        is_first = bool(ahead) and step > ahead[0]
        while ahead and step > ahead[0]:
            ahead.pop(0)
        low, high = (min(values), max(values)) if len(found) > bins else (None, None)
        points.append(Point(step, mean, low, high, is_first))
    return points
