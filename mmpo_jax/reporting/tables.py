"""Tables of a page, and the bars of its stages, as plain cells."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mmpo_jax.core.progress import duration
from mmpo_jax.reporting.charts import SLOTS, number
from mmpo_jax.reporting.measured import Benchmark, Group, Metric, Value
from mmpo_jax.reporting.runs import Kind, Round, RunFiles


@dataclasses.dataclass(frozen=True)
class Cell:
    text: str
    note: str = ""
    """What stands behind it, smaller."""
    kind: str = ""
    """Of the note: `better`, `worse` or neither."""


@dataclasses.dataclass(frozen=True)
class Head:
    text: str
    span: int = 1
    """Columns that it stands over."""


@dataclasses.dataclass(frozen=True)
class TableRow:
    name: str
    cells: Sequence[Cell]
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Table:
    caption: str
    head: Sequence[Sequence[Head]]
    rows: Sequence[TableRow]


COUNTS: tuple[tuple[str, Callable[[dict[str, Any]], Any]], ...] = (
    ("prompts", lambda row: row.get("prompts")),
    ("responses", lambda row: row.get("responses")),
    ("failed", lambda row: row.get("failed")),
    ("claims", lambda row: row.get("claims")),
    ("rejected", lambda row: row.get("rejected_claims")),
    ("pairs", lambda row: row.get("pairs")),
    ("trained", lambda row: row.get("trained")),
    ("chosen words", lambda row: row.get("chosen_words")),
    ("rejected words", lambda row: row.get("rejected_words")),
    ("accuracy", lambda row: row.get("dpo_accuracy")),
    ("margin", lambda row: row.get("dpo_margin")),
)
"""Column of the table of rounds, and its value from a line of `rounds.json`."""
ARROWS = {"more": "↑", "less": "↓", None: ""}
"""Which way is better."""
MARKS = {"better": " ✓", "worse": " ✗", "": ""}
"""What stands behind a change, beside its colour."""
SOURCES = ("responses", "failed", "mean_score", "mean_words", "chosen", "rejected")
"""Columns of the table of candidates' sources."""


def shown(value: Any) -> str:
    """A number for people; nothing for none."""
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int) else number(float(value))


def place_name(kind: Kind, place: int) -> str:
    """How a round, or an update of a training, is called; number 0 is the start model, or the one
    that is evaluated."""
    if kind == "evaluate":
        return "model"
    if not place:
        return "start"
    return f"round {place}" if kind == "align" else f"update {place:,}"


def benchmark_table(benchmark: Benchmark, groups: Sequence[Group]) -> Table:
    """A row for every metric, and a column for every round, or update, of every group."""
    top = [Head("")]
    for place, group in enumerate(groups):
        span = sum(of == place for of, _ in benchmark.columns)
        if span:
            top.append(Head(group.label, span))
    rounds = [Head("metric")]
    rounds += [Head(place_name(benchmark.kind, place)) for _, place in benchmark.columns]
    rows = [
        TableRow(
            metric.name,
            [_value(metric, metric.values.get(column)) for column in benchmark.columns],
            ARROWS[metric.better],
        )
        for metric in benchmark.metrics
    ]
    head = [rounds] if len(top) == 2 and len(groups) == 1 else [top, rounds]
    since = "" if benchmark.kind == "evaluate" else "with the change since the start; "
    told = f"{since}↑ more is better, ↓ less is"
    return Table(f"{benchmark.name}: every metric, {told}", head, rows)


def _value(metric: Metric, value: Value | None) -> Cell:
    if value is None:
        return Cell("")
    text = number(value.mean)
    if value.deviation is not None:
        text += f" ± {number(value.deviation)}"
    if value.start is None:
        return Cell(text)
    change = value.mean - value.start
    told = f"{'+' if change > 0 else '−'}{number(abs(change))}" if change else "="
    verdict = metric.verdict(value)
    return Cell(text, told + MARKS[verdict], verdict)


def tax_table(run: RunFiles) -> Table | None:
    """What a run gained and lost, with intervals and paired tests; None where nobody knows."""
    tax = run.tax
    if not tax.get("rows"):
        return None
    several = len({row["benchmark"] for row in tax["rows"]}) > 1
    rows = [
        TableRow(
            row["metric"],
            [_tax_cell(row, cell) for cell in row["cells"]],
            " ".join([*([row["benchmark"]] if several else []), ARROWS[row["better"]]]).strip(),
        )
        for row in tax["rows"]
    ]
    marks = [
        Head(name + (" (result)" if name == tax["result"] else "")) for name in tax["compared"]
    ]
    told = (
        f"{run.name}: gains and losses since the start, with {tax['confidence']:.0%} intervals "
        "(bootstrap over records) and p of a paired test, not corrected for the number of metrics"
    )
    return Table(told, [[Head("metric"), *marks]], rows)


def _tax_cell(row: Mapping[str, Any], cell: Mapping[str, Any]) -> Cell:
    def told(value: float | None) -> str:
        return "" if value is None else format(value, row["format"])

    text = told(cell["value"])
    if cell["low"] is not None:
        text += f" [{told(cell['low'])}, {told(cell['high'])}]"
    if cell["p"] is None:
        return Cell(text)
    gained = cell["difference"]
    note = (
        f"{'+' if gained > 0 else '−' if gained < 0 else ''}{told(abs(gained))}, p {cell['p']:.2g}"
    )
    kind = cell["verdict"] if cell["verdict"] in MARKS else ""
    return Cell(text, note + MARKS[kind], kind)


def counts_table(runs: Sequence[RunFiles]) -> Table | None:
    """What the rounds did; None where there are none."""
    lines = [(run, one) for run in runs for one in run.rounds if one.index and one.counts]
    columns = [
        (name, read)
        for name, read in COUNTS
        if any(read(dict(one.counts)) is not None for _, one in lines)
    ]
    if not columns:
        return None
    rows = [
        TableRow(
            _place(runs, run, one), [Cell(shown(read(dict(one.counts)))) for _, read in columns]
        )
        for run, one in lines
    ]
    return Table("What the rounds did", [[Head("round"), *(Head(n) for n, _ in columns)]], rows)


def sources_table(runs: Sequence[RunFiles]) -> Table | None:
    """What each source of candidates gave; None where no round has several."""
    rows = [
        TableRow(f"{_place(runs, run, one)}, {name}", [Cell(shown(of.get(key))) for key in SOURCES])
        for run in runs
        for one in run.rounds
        for name, of in one.counts.get("sources", {}).items()
    ]
    head = [Head("source"), *(Head(name.replace("_", " ")) for name in SOURCES)]
    return Table("What the sources of candidates gave", [head], rows) if rows else None


def _place(runs: Sequence[RunFiles], run: RunFiles, one: Round) -> str:
    place = "training" if run.kind == "train" else place_name(run.kind, one.index)
    return place if len(runs) == 1 else f"{run.name}, {place}"


@dataclasses.dataclass(frozen=True)
class BarPart:
    weight: float
    slot: int
    told: str


@dataclasses.dataclass(frozen=True)
class Bar:
    """Where the time of a round went."""

    name: str
    total: str
    parts: Sequence[BarPart]
    rest: float
    """Seconds that the longest took more."""


@dataclasses.dataclass(frozen=True)
class Stages:
    bars: Sequence[Bar]
    legend: Sequence[tuple[str, int]]
    table: Table


def stage_bars(runs: Sequence[RunFiles]) -> Stages | None:
    """What the stages of all rounds took; None where nobody knows."""
    lines = [(run, one) for run in runs for one in run.rounds if one.stages]
    if not lines:
        return None
    sums: dict[str, float] = {}
    for _, one in lines:
        for name, took in one.stages.items():
            sums[name] = sums.get(name, 0.0) + _seconds(took)
    largest = sorted(sums, key=lambda name: -sums[name])
    slots = {name: min(slot, SLOTS - 1) for slot, name in enumerate(largest)}
    longest = max(sum(map(_seconds, one.stages.values())) for _, one in lines)
    bars, rows = [], []
    for run, one in lines:
        seconds = sum(map(_seconds, one.stages.values()))
        parts = [
            BarPart(_seconds(took), slots[name], f"{name}: {number(_seconds(took))} s")
            for name, took in one.stages.items()
        ]
        place = _place(runs, run, one)
        bars.append(Bar(place, duration(seconds), parts, longest - seconds))
        for name, took in one.stages.items():
            cells = [
                Cell(shown(took[key]))
                for key in ("seconds", "rows", "rows_per_second", "tokens_per_second")
            ]
            rows.append(TableRow(f"{place}, {name}", cells))
    head = [Head(name) for name in ("stage", "seconds", "rows", "rows/s", "tokens/s")]
    return Stages(bars, list(slots.items()), Table("Every stage of every round", [head], rows))


def _seconds(took: Mapping[str, float | None]) -> float:
    return took["seconds"] or 0.0
