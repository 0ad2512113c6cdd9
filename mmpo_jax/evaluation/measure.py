"""A model measured by the benchmarks of a recipe: answers in stages, then scores, in a folder.

    NAME.parquet, NAME-WAY.parquet   what the model says, a stage for every way of asking
    NAME-prompts.parquet             the first questions with small pictures, for the report
    NAME.answers.jsonl               the same in the layout that `mmpo evaluate --responses` reads
    NAME.scores.json                 scores in the layout that `mmpo evaluate --output` writes

Scores are made of the file of answers, by the function that scores anybody's.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

from etils import epath

from mmpo_jax.benchmarks.benchmark import PICTURE, Asked, Benchmark, Files, Metric, Scores
from mmpo_jax.benchmarks.judging import Judge
from mmpo_jax.benchmarks.score_files import as_report, read_scores, score_rows
from mmpo_jax.benchmarks.tables import read_table
from mmpo_jax.core import progress
from mmpo_jax.core.files import fingerprint_file, fingerprint_json, read_json, write_json
from mmpo_jax.core.processes import on_one
from mmpo_jax.evaluation.answers import Measuring, asked_records, write_answers
from mmpo_jax.evaluation.judge_models import asked_judge
from mmpo_jax.recipes.evaluation import BenchmarkSection, JudgedSection
from mmpo_jax.reporting.prompts import STAGE as PROMPTS
from mmpo_jax.reporting.prompts import write_prompts

KEPT = 200
"""Questions of each way of asking that the report shows."""
SCORING_RULES = 2
"""Part of the key of scores: changes with what any benchmark makes of answers."""


@dataclasses.dataclass(frozen=True)
class Measured:
    """What a benchmark says of a model."""

    name: str
    """That of its section."""
    benchmark: Benchmark
    scores: Scores

    def values(self) -> dict[str, float]:
        """`NAME/METRIC` -> value: its metrics, and what runs show of what stands beside them."""
        shown = {metric.name for metric in self.benchmark.metrics}
        beside = {name: x for name, x in self.scores.beside.items() if name in shown}
        return {f"{self.name}/{key}": x for key, x in {**self.scores.metrics, **beside}.items()}


@dataclasses.dataclass(frozen=True)
class Shown:
    """A metric of a benchmark in a run."""

    benchmark: str
    """Name of its section."""
    metric: Metric
    heading: str
    """Of its column; with the benchmark's name where several are measured."""

    @property
    def key(self) -> str:
        """Its name among the values of a run."""
        return f"{self.benchmark}/{self.metric.name}"


def shown_metrics(sections: Sequence[BenchmarkSection]) -> list[Shown]:
    """The metrics that a run shows, in order."""
    return [
        Shown(
            section.called,
            metric,
            (f"{section.called} " if len(sections) > 1 else "") + (metric.heading or metric.name),
        )
        for section in sections
        for metric in section.benchmark.metrics
    ]


def measure(sections: Sequence[BenchmarkSection], at: Measuring) -> list[Measured]:
    """What benchmarks say of a model, made now as far as it is not in the folder.

    Raises:
      MmpoError: whatever the user can mend, naming it.
    """
    found = []
    for section in sections:
        with progress.doing(section.called):
            progress.tell()
            found.append(_measured(section, at))
    return found


def check_questions(sections: Sequence[BenchmarkSection]) -> None:
    """Reads the questions of all benchmarks, before a model is loaded or answers the first.

    Raises:
      MmpoError: naming the file, row or image that is missing or of no use.
    """
    for section in sections:
        with progress.doing(f"reading the questions of {section.called}"):
            _asked(section, section.files())


def read_measured(sections: Sequence[BenchmarkSection], folder: str) -> list[Measured]:
    """What `measure` left in a folder."""
    found = []
    for section in sections:
        report = read_json(os.path.join(folder, f"{section.called}.scores.json"))
        found.append(Measured(section.called, section.benchmark, read_scores(report)))
    return found


def all_values(measured: Sequence[Measured]) -> dict[str, float]:
    """The values of several benchmarks."""
    return {key: value for one in measured for key, value in one.values().items()}


def describe(measured: Sequence[Measured], shown: Sequence[Shown]) -> dict[str, Any]:
    """All values, and what runs show of them, as JSON: `metrics`, value by `NAME/METRIC`, and
    `shown`, a list of `key`, `benchmark`, `heading`, `better`, `format`, `guards` and `panel`, see
    `Metric`.
    """
    return {
        "metrics": all_values(measured),
        "shown": [
            {
                "key": one.key,
                "benchmark": one.benchmark,
                "heading": one.heading,
                "better": one.metric.better,
                "format": one.metric.form,
                "guards": one.metric.guards,
                "panel": one.metric.panel,
            }
            for one in shown
        ],
    }


def _asked(section: BenchmarkSection, files: Files) -> Sequence[Asked]:
    """The questions of a benchmark."""
    asks = section.benchmark.asks
    assert asks is not None
    return asks(files, **section.options(section.benchmark.asking_options))


def _measured(section: BenchmarkSection, at: Measuring) -> Measured:
    benchmark = section.benchmark
    files = section.files()
    asked = _asked(section, files)
    answers, pictures = write_answers(section, asked, at), _pictures(asked)
    write_prompts(at.folder, asked_records(asked, KEPT), f"{section.called}-{PROMPTS}")
    if isinstance(section, JudgedSection):
        return Measured(section.called, benchmark, _judged(section, files, answers, pictures, at))
    scores = on_one(lambda: _scored(section, files, answers, pictures, at))
    return Measured(section.called, benchmark, scores)


def _pictures(asked: Sequence[Asked]) -> dict[str, int]:
    """Id of a question -> number of the picture that it is about, the same for the same one."""
    numbers: dict[Any, int] = {}
    return {
        record.id: numbers.setdefault(tuple(image.place for image in record.images), len(numbers))
        for one in asked
        for record in one.records
        if record.images
    }


def _scored(
    section: BenchmarkSection,
    files: Files,
    answers: str,
    pictures: Mapping[str, int],
    at: Measuring,
) -> Scores:
    """Scores of a file of answers, from their own file where nothing that they depend on is new, as
    far as the benchmark's files are asked for by `Files.find`."""
    options = section.options(section.benchmark.options)
    key = fingerprint_json([SCORING_RULES, section.type, options, fingerprint_file(answers)])
    saved = read_json(_scores_file(section, at))
    known = bool(files.found) or not section.benchmark.source
    if known and saved.get("key") == key and files.are(saved["files"]):
        return read_scores(saved)
    scores = score_rows(section.benchmark, files, read_table(epath.Path(answers)), options)
    return _kept(section, scores, pictures, at, files=files.digests(), key=key)


def _judged(
    section: JudgedSection,
    files: Files,
    answers: str,
    pictures: Mapping[str, int],
    at: Measuring,
) -> Scores:
    """Scores of a file of answers that a model judges, of which each is asked about once."""
    options = section.options(section.benchmark.options)
    rows = on_one(lambda: read_table(epath.Path(answers)))
    folder = os.path.join(at.folder, f"{section.called}.judge")
    asked = nullcontext(Judge()) if section.judge is None else asked_judge(section.judge, folder)
    with asked as judge:
        scores = score_rows(section.benchmark, files, rows, options, judge)
        return on_one(lambda: _kept(section, scores, pictures, at, judge, files=files.digests()))


def _kept(
    section: BenchmarkSection,
    scores: Scores,
    pictures: Mapping[str, int],
    at: Measuring,
    judge: Judge | None = None,
    **more: Any,
) -> Scores:
    """Writes scores, with the numbers of pictures in their rows; as they are read again."""
    rows = [
        {**row, PICTURE: pictures[name]} if (name := str(row.get("id"))) in pictures else row
        for row in scores.rows
    ]
    scores = dataclasses.replace(scores, rows=rows)
    options = section.options(section.benchmark.options)
    more = {"name": section.called, "model": at.checkpoint.fingerprint, **more}
    report = as_report(section.benchmark, scores, options, judge, **more)
    write_json(_scores_file(section, at), report)
    return read_scores(read_json(_scores_file(section, at)))


def _scores_file(section: BenchmarkSection, at: Measuring) -> str:
    return os.path.join(at.folder, f"{section.called}.scores.json")
