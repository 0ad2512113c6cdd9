"""What a person sees of an alignment: a table with a line per round, warnings, curves."""

from __future__ import annotations

import dataclasses
import io
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence

import pyarrow as pa

from mmpo_jax.core.files import read_json, read_table, write_atomic
from mmpo_jax.feedback.judge import VERDICTS, scored_responses
from mmpo_jax.feedback.rate import read_rate
from mmpo_jax.feedback.scores import accepted
from mmpo_jax.reporting.runs import stage_rates
from mmpo_jax.training.metrics import FILE, read_metrics

RECALL_LOSS = 0.03
LENGTH_LOSS = 0.15
"""Losses of recall and of length, against the start model, from which on the report warns of
silence."""
UNPARSED_GAIN = 0.05
"""Gain in pieces that cannot be read from which on the report warns of them."""

DPO_UPDATES = 10
"""Updates before the steps whose accuracy and margin the report warns of: earlier ones have hardly
moved the model, and before the first there is nothing but rounding."""
DPO_LOSS = 1e-3
"""Margin, below 0, from which on the report warns of it; less is rounding."""

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
    ("CHAIR_i", "sampled/chair_i", ".3f"),
    ("CHAIR_s", "sampled/chair_s", ".3f"),
    ("recall", "sampled/recall", ".3f"),
    ("length", "sampled/mean_length", ".1f"),
    ("greedy CHAIR_s", "greedy/chair_s", ".3f"),
    ("greedy recall", "greedy/recall", ".3f"),
    ("yes/no", "yes_no_accuracy", ".3f"),
)
"""(heading, key, format) of the table."""

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

    def values(self) -> dict[str, float]:
        """Everything the table shows, by key, but for a rate, which is another every time."""
        values = {key: self.value(key) for _, key, _ in COLUMNS if key != "questions_per_second"}
        return {key: value for key, value in values.items() if value is not None}


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
    details = [json.loads(text) for text in judged["details"].to_pylist()]
    verdicts = [
        accepted(verdict["p_yes"], verdict["p_no"])
        for said in details
        for verdict in said.get(VERDICTS, [])
        if None not in (verdict["p_yes"], verdict["p_no"])
    ]
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
        claims=len(verdicts) or None,
        rejected_claims=verdicts.count(False) if verdicts else None,
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


def render_table(reports: Sequence[RoundReport]) -> str:
    """The table as text, without columns that have no value, and without that of the trained pairs
    where these are all pairs."""
    empty = {key for _, key, _ in COLUMNS if all(report.value(key) is None for report in reports)}
    if all(report.trained in (None, report.pairs) for report in reports):
        empty.add("trained")
    shown = [column for column in COLUMNS if column[1] not in empty]
    rows = [[heading for heading, _, _ in shown]]
    for report in reports:
        rows.append([_cell(report.value(key), form) for _, key, form in shown])
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


def warnings(reports: list[RoundReport]) -> list[str]:
    """What a person should know: counting rejected claims rewards saying less."""
    found = []
    start = reports[0].metrics
    for report in reports[1:]:
        for decoding in ("sampled", "greedy"):
            recall, length = f"{decoding}/recall", f"{decoding}/mean_length"
            if recall not in start or recall not in report.metrics:
                continue
            lost = start[recall] - report.metrics[recall]
            shorter = 1 - report.metrics[length] / start[length] if start[length] else 0.0
            if lost > RECALL_LOSS:
                found.append(
                    f"round {report.index}: {decoding} recall fell by {lost:.3f} since the start; "
                    "the model avoids errors by saying less (lower the learning rate or epochs)"
                )
            elif shorter > LENGTH_LOSS and decoding == "sampled":
                found.append(
                    f"round {report.index}: responses are {shorter:.0%} shorter than at the start"
                )
        unparsed = "sampled/unparsed"
        if report.metrics.get(unparsed, 0) - start.get(unparsed, 0) > UNPARSED_GAIN:
            found.append(
                f"round {report.index}: {report.metrics[unparsed]:.0%} of the responses hold "
                "pieces that cannot be read; the model is coming apart (lower the learning rate)"
            )
        if _prefers_rejected(report):
            found.append(
                f"round {report.index}: DPO prefers the rejected responses; it did not learn"
            )
    return found


def _prefers_rejected(report: RoundReport) -> bool:
    """Whether accuracy and margin both say so, after enough updates to say anything."""
    accuracy, margin, updates = report.dpo_accuracy, report.dpo_margin, report.dpo_updates
    if accuracy is None or margin is None or updates is None:
        return False
    return accuracy < 0.5 and margin < -DPO_LOSS and updates >= DPO_UPDATES


def write_report(folder: str, reports: list[RoundReport]) -> None:
    """Writes `rounds.json`, `rounds.txt` and `curves.png`."""
    rows = [dataclasses.asdict(report) for report in reports]
    write_atomic(os.path.join(folder, "rounds.json"), json.dumps(rows, indent=1).encode())
    sources, stages = render_sources(reports), render_stages(reports)
    told = [render_table(reports), *(["", sources, ""] if sources else []), *warnings(reports)]
    text = "\n".join([*told, *(["", stages] if stages else []), ""])
    write_atomic(os.path.join(folder, "rounds.txt"), text.encode())
    if len(reports) > 1 and reports[0].metrics:
        draw_curves(os.path.join(folder, "curves.png"), reports)


def draw_curves(path: str, reports: list[RoundReport]) -> None:
    """Hallucination, recall and length over the rounds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = (
        ("CHAIR_s (lower is better)", "chair_s"),
        ("CHAIR_i (lower is better)", "chair_i"),
        ("recall", "recall"),
        ("mean length [words]", "mean_length"),
    )
    figure, axes = pyplot.subplots(1, len(panels), figsize=(14, 3.2))
    rounds = [report.index for report in reports]
    for axis, (title, name) in zip(axes, panels, strict=True):
        for decoding in ("sampled", "greedy"):
            values = [report.metrics[f"{decoding}/{name}"] for report in reports]
            axis.plot(rounds, values, marker="o", label=decoding)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("round")
        axis.set_xticks(rounds)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.tight_layout()
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=120)
    write_atomic(path, drawn.getvalue())
    pyplot.close(figure)
