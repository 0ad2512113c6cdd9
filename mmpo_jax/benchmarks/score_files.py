"""A file of answers scored by a benchmark, and the file that says what came out."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from mmpo_jax.benchmarks.benchmark import Benchmark, Files, Scores, find_benchmark
from mmpo_jax.benchmarks.judging import Judge
from mmpo_jax.benchmarks.tables import Row, read_table
from mmpo_jax.core.errors import MmpoError
from mmpo_jax.core.files import check_reachable, write_json


def score_answers(
    name: str,
    data: str | None,
    answers: str,
    output: str,
    options: Mapping[str, Any] | None = None,
    judge: Judge | None = None,
) -> Scores:
    """Scores the answers of a file and writes what comes out, see `as_report`.

    Args:
      name: of the benchmark.
      data: folder of its published files; None for one that has none.
      answers: file of the answers.
      output: JSON file.
      options: of the benchmark, by name.
      judge: of the answers, for benchmarks that have one.

    Raises:
      MmpoError: naming a file or row that is missing or of no use.
    """
    chosen = find_benchmark(name)
    check_reachable(epath.Path(output).parent)
    if epath.Path(output).is_dir():
        raise MmpoError(f"--output {output} is a folder; name a file in it")
    judge = judge or Judge()
    read = {"--data": data, "--responses": answers, "--judgements": judge.given}
    for name_of, given in read.items():
        if given is not None and os.path.realpath(given) == os.path.realpath(output):
            raise MmpoError(f"--output {output} is the file of {name_of}; give another one")
    files = chosen.files(data)
    rows = read_table(epath.Path(answers))
    if not rows:
        raise MmpoError(f"{answers}: has no rows")
    scores = score_rows(chosen, files, rows, options or {}, judge)
    write_json(output, as_report(chosen, scores, options or {}, judge))
    return scores


def score_rows(
    benchmark: Benchmark,
    files: Files,
    rows: Sequence[Row],
    options: Mapping[str, Any],
    judge: Judge | None = None,
) -> Scores:
    """What a benchmark makes of answers; arguments as of `score_answers`."""
    judged = () if benchmark.judgements is None else (judge or Judge(),)
    return benchmark.score(files, rows, *judged, **options)


def as_report(
    benchmark: Benchmark,
    scores: Scores,
    options: Mapping[str, Any],
    judge: Judge | None = None,
    **more: Any,
) -> dict[str, Any]:
    """What is written of scores: `benchmark`, `metrics`, `beside`, `options`, `rows`, each as in
    `Scores`, `made_with` too, `judges`, who judged and how, and whatever else is known of them."""
    return {
        "benchmark": benchmark.name,
        "metrics": scores.metrics,
        "beside": scores.beside,
        "options": {
            key: options.get(key, default) for key, (_, default) in benchmark.options.items()
        },
        "made_with": scores.made_with,
        **({"judges": judge.told} if judge is not None and judge.told else {}),
        **more,
        "rows": scores.rows,
    }


def read_scores(report: Mapping[str, Any]) -> Scores:
    """The scores of what `as_report` made, as JSON; null is NaN."""

    def numbers(values: Mapping[str, float | None]) -> dict[str, float]:
        return {name: math.nan if x is None else x for name, x in values.items()}

    metrics, beside = numbers(report["metrics"]), numbers(report["beside"])
    return Scores(metrics, beside, report["rows"], report["made_with"])
