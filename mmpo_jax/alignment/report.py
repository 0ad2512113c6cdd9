"""What a person sees of an alignment: a table with a line per round, and warnings."""

from __future__ import annotations

import dataclasses
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from mmpo_jax.alignment.selection import count_verdicts
from mmpo_jax.core.files import read_json, read_table, write_atomic, write_json
from mmpo_jax.evaluation.measure import Shown
from mmpo_jax.evaluation.tax import FILE as TAX
from mmpo_jax.evaluation.tax import render_tax
from mmpo_jax.feedback.judge import scored_responses
from mmpo_jax.feedback.rate import read_rate
from mmpo_jax.reporting.runs import stage_rates, training_warnings
from mmpo_jax.training.metrics import FILE, read_metrics

COLUMNS: tuple[tuple[str, str, str], ...] = (
    ("round", "round", "d"),
    ("prompts", "prompts", "d"),
    ("responses", "responses", "d"),
    ("failed", "failed", "d"),
    ("claims", "claims", "d"),
    ("rejected", "rejected_claims", "d"),
    ("asked/s", "questions_per_second", ".3g"),
    ("pairs", "pairs", "d"),
    ("trained", "trained", "d"),
    ("chosen", "chosen_words", ".1f"),
    ("against", "rejected_words", ".1f"),
    ("dpo acc", "dpo_accuracy", ".2f"),
    ("margin", "dpo_margin", ".2f"),
    ("held out", "held_out/rejected_share", ".3f"),
    ("held score", "held_out/score", ".3g"),
)
"""(heading, key, format) of the table; behind them stand those of the benchmarks."""

SOURCE_COLUMNS: tuple[tuple[str, str, str], ...] = (
    ("responses", "responses", "d"),
    ("failed", "failed", "d"),
    ("score", "mean_score", ".3g"),
    ("words", "mean_words", ".1f"),
    ("chosen", "chosen", "d"),
    ("rejected", "rejected", "d"),
)
"""The same of the table of sources."""

STAGE_COLUMNS: tuple[tuple[str, str, str], ...] = (
    ("seconds", "seconds", ".1f"),
    ("rows", "rows", "d"),
    ("rows/s", "rows_per_second", ".3g"),
    ("tokens/s", "tokens_per_second", ".4g"),
)
"""The same of the table of stages."""


@dataclasses.dataclass(frozen=True)
class RoundReport:
    """One line of the table: what a round did and how its model does on held-out data."""

    index: int
    metrics: dict[str, float]
    prompts: int | None = None
    responses: int | None = None
    failed: int | None = None
    """Responses without a verdict; None where all have one."""
    claims: int | None = None
    rejected_claims: int | None = None
    questions_per_second: float | None = dataclasses.field(default=None, compare=False)
    """Rate at which a labeler answered, which is another every time."""
    pairs: int | None = None
    trained: int | None = None
    """Those of the pairs that training could use."""
    chosen_words: float | None = None
    """Mean length of the chosen responses, in words."""
    rejected_words: float | None = None
    """Mean length of those that they are preferred to, in words."""
    dpo_accuracy: float | None = None
    dpo_margin: float | None = None
    dpo_updates: int | None = None
    """Updates before the first of the steps that the two are means of."""
    counts: dict[str, int] = dataclasses.field(default_factory=dict)
    """What pairing dropped, and why."""
    sources: dict[str, dict[str, float | None]] = dataclasses.field(default_factory=dict)
    """What each source of candidates gave, where there are several; see `count_sources`."""
    stages: dict[str, dict[str, float | None]] = dataclasses.field(
        default_factory=dict, compare=False
    )
    """What each stage took, which is another every time; see `stage_rates`."""

    def value(self, key: str) -> float | None:
        if key == "round":
            return self.index
        return self.metrics.get(key, getattr(self, key, None))

    def values(self, shown: Sequence[Shown] = ()) -> dict[str, float]:
        """Everything the table shows, by key, but for a rate, which is another every time."""
        keys = [key for _, key, _ in columns(shown) if key != "questions_per_second"]
        values = {key: self.value(key) for key in keys}
        return {key: value for key, value in values.items() if value is not None}


def columns(shown: Sequence[Shown]) -> list[tuple[str, str, str]]:
    """(heading, key, format) of the table of a run that shows these metrics."""
    measured = [(one.heading, one.key, one.metric.form) for one in shown if one.metric.column]
    return [*COLUMNS, *measured]


def read_report(index: int, folder: str, metrics: dict[str, float], responses: str) -> RoundReport:
    """A finished round's line, from the files of its stages.

    Args:
      index: of the round.
      folder: of the round.
      metrics: of its model.
      responses: name of the stage that has its responses.
    """
    judged = read_table(os.path.join(folder, "judge.parquet"))
    pairs = read_table(os.path.join(folder, "pairs.parquet"))
    generated = read_table(os.path.join(folder, f"{responses}.parquet"))
    claims, rejected = count_verdicts(judged)
    failed = len(judged) - judged["reason"].null_count
    # A person may have removed the training's files, which are large, and kept the model.
    trained = read_metrics(os.path.join(folder, "train", FILE))
    half = len(trained) // 2
    return RoundReport(
        index=index,
        metrics=metrics,
        prompts=len(set(judged["prompt_id"].to_pylist())),
        responses=judged.num_rows,
        failed=failed or None,
        claims=claims or None,
        rejected_claims=rejected if claims else None,
        questions_per_second=read_rate(folder),
        pairs=pairs.num_rows,
        trained=read_json(os.path.join(folder, "train.json")).get("trained"),
        chosen_words=_mean_words(pairs, "chosen"),
        rejected_words=_mean_words(pairs, "rejected"),
        dpo_accuracy=_late_mean(trained, "rewards/accuracies"),
        dpo_margin=_late_mean(trained, "rewards/margins"),
        dpo_updates=(int(trained[half - 1]["step"]) if half else 0) if trained else None,
        counts=json.loads(pairs.schema.metadata[b"counts"]),
        sources=count_sources(generated, judged, pairs),
        stages=stage_rates(folder),
    )


def count_sources(
    generated: pa.Table, judged: pa.Table, pairs: pa.Table
) -> dict[str, dict[str, float | None]]:
    """What each source of candidates contributed to a round; empty where there is one alone.

    Args:
      generated, judged, pairs: the tables of the round's stages.

    Returns:
      By the source's name: its `responses`, those that `failed`, `mean_score` (of the others; None
      where there are none), `mean_words`, and how often they were `chosen` and `rejected` in pairs.
    """
    scored = scored_responses(generated, judged)
    source_of = {(row.prompt_id, row.sample): row.source for row in scored}
    counts: dict[str, dict[str, float | None]] = {}
    for source in dict.fromkeys(row.source for row in scored):
        rows = [row for row in scored if row.source == source]
        scores = [row.score for row in rows if row.reason is None]
        counts[source] = {
            "responses": len(rows),
            "failed": len(rows) - len(scores),
            "mean_score": _mean(scores),
            "mean_words": _mean([len(row.text.split()) for row in rows]),
        }
    if len(counts) < 2:
        return {}
    for side in ("chosen", "rejected"):
        taken = zip(
            pairs["prompt_id"].to_pylist(), pairs[f"{side}_sample"].to_pylist(), strict=True
        )
        times = Counter(source_of[response] for response in taken)
        for source, count in counts.items():
            count[side] = times[source]
    return counts


def _mean_words(pairs: pa.Table, side: str) -> float | None:
    return _mean([len(text.split()) for text in pairs[side].to_pylist()])


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _late_mean(rows: list[dict[str, float]], name: str) -> float | None:
    """The mean over the second half of the training; single steps are noise."""
    return _mean([row[name] for row in rows[len(rows) // 2 :] if name in row])


def render_table(reports: Sequence[RoundReport], shown: Sequence[Shown] = ()) -> str:
    """The table as text, without columns that have no value, and without that of the trained pairs
    where these are all pairs.

    Args:
      reports: of the rounds.
      shown: metrics of the benchmarks that the run is measured by.
    """
    known = columns(shown)
    empty = {key for _, key, _ in known if all(report.value(key) is None for report in reports)}
    if all(report.trained in (None, report.pairs) for report in reports):
        empty.add("trained")
    kept = [column for column in known if column[1] not in empty]
    rows = [[heading for heading, _, _ in kept]]
    for report in reports:
        rows.append([_cell(report.value(key), form) for _, key, form in kept])
    return _aligned(rows)


def render_sources(reports: Sequence[RoundReport]) -> str:
    """What each source of candidates gave, a line per round and source; empty where no round has
    several."""
    return _render_parts("source", SOURCE_COLUMNS, {r.index: r.sources for r in reports})


def render_stages(reports: Sequence[RoundReport]) -> str:
    """What each stage took, a line per round and stage; empty where nobody knows."""
    return _render_parts("stage", STAGE_COLUMNS, {r.index: r.stages for r in reports})


def _render_parts(
    heading: str,
    columns: Sequence[tuple[str, str, str]],
    parts: Mapping[int, Mapping[str, Mapping[str, float | None]]],
) -> str:
    """A table with a line per round and part of it; empty where there is no part.

    Args:
      heading: of the parts' names.
      columns: (heading, key, format) of the others.
      parts: round -> name -> key -> value.
    """
    rows = [["round", heading, *(name for name, _, _ in columns)]]
    for index, named in parts.items():
        for name, values in named.items():
            cells = [_cell(values[key], form) for _, key, form in columns]
            rows.append([str(index), name, *cells])
    return _aligned(rows) if len(rows) > 1 else ""


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(lines)


def warnings(reports: Sequence[RoundReport], tax: Mapping[str, Any] | None = None) -> list[str]:
    """What a person should know.

    Args:
      reports: of the rounds.
      tax: see `evaluation.tax`; None where nothing was measured.
    """
    found = [] if tax is None else list(tax["warnings"])
    for report in reports[1:]:
        found += training_warnings(report.index, dataclasses.asdict(report))
    return found


def write_report(
    folder: str,
    reports: list[RoundReport],
    shown: Sequence[Shown] = (),
    tax: Mapping[str, Any] | None = None,
) -> None:
    """Writes `rounds.json` and `rounds.txt`, and of what was measured `tax.json`; arguments as of
    `render_table` and `warnings`."""
    rows = [dataclasses.asdict(report) for report in reports]
    write_json(os.path.join(folder, "rounds.json"), rows)
    if tax is not None:
        write_json(os.path.join(folder, TAX), tax)
    sources, stages = render_sources(reports), render_stages(reports)
    parts = [
        render_table(reports, shown),
        sources,
        "\n".join(warnings(reports, tax)),
        "" if tax is None else render_tax(tax),
        stages,
    ]
    text = "\n\n".join(filter(None, parts)) + "\n"
    write_atomic(os.path.join(folder, "rounds.txt"), text.encode())
