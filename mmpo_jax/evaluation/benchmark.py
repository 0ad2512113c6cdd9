"""Benchmarks whose answers are there: a registry, and what scoring one gives.

A benchmark is a module with one registered function (files, answers, **options) -> `Scores`. It
reads the files as their authors publish them, computes what the official script computes, quirks
included, under the official names, and says beside it what misleads. Nothing here runs a model.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from mmpo_jax.core.errors import MmpoError
from mmpo_jax.core.files import check_reachable, null_if_not_finite, write_atomic
from mmpo_jax.core.sections import keyword_options
from mmpo_jax.evaluation.tables import Row, read_table

MODULES = (
    "mm_rlhf_rewardbench",
    "mmstar",
    "multimodal_rewardbench",
    "pope",
    "vl_rewardbench",
)
"""Modules of this package that register a benchmark."""


@dataclasses.dataclass(frozen=True)
class Scores:
    """What a benchmark says of answers."""

    metrics: Mapping[str, float]
    """By the official names, in the official unit, not rounded; NaN where a denominator is 0."""
    beside: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """What the metrics do not show: answers that could not be read, shares of "no", lengths."""
    rows: Sequence[Mapping[str, Any]] = ()
    """What became of every answer, as JSON."""


@dataclasses.dataclass(frozen=True)
class Files:
    """The published files of a benchmark."""

    root: epath.Path
    """Their folder, or one of them."""
    source: str
    """Where users get them."""

    def find(self, *patterns: str) -> list[epath.Path]:
        """The files of the first pattern that has any, in the order of their names.

        Raises:
          MmpoError: there are none.
        """
        if not self.root.is_dir() and self.root.exists():
            return [self.root]
        for pattern in patterns:
            found = sorted(self.root.glob(pattern))
            if found:
                return found
        raise MmpoError(
            f"{self.root}: has no {' or '.join(patterns)}; the file is part of {self.source}"
        )

    def rows(self, *patterns: str) -> list[Row]:
        """The rows of those files, one file after the other.

        Raises:
          MmpoError: there is no such file, or it cannot be read.
        """
        return [row for path in self.find(*patterns) for row in read_table(path)]


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A benchmark by its name."""

    name: str
    score: Callable[..., Scores]
    source: str
    """Where users get its files."""
    answers: str
    """What rows of answers have, in words."""

    @property
    def options(self) -> dict[str, tuple[Any, Any]]:
        """Its rules that can be chosen: name -> (type, default)."""
        return keyword_options(self.score)

    @property
    def summary(self) -> str:
        """The docstring's first paragraph, in one line."""
        return (inspect.getdoc(self.score) or "").split("\n\n")[0].replace("\n", " ")


_BENCHMARKS: dict[str, Benchmark] = {}


def benchmark(
    source: str, answers: str
) -> Callable[[Callable[..., Scores]], Callable[..., Scores]]:
    """Registers a benchmark under its function's name; arguments as in `Benchmark`."""

    def add(function: Callable[..., Scores]) -> Callable[..., Scores]:
        name = function.__name__
        _BENCHMARKS[name] = Benchmark(name, function, source, answers)
        return function

    return add


def benchmarks() -> dict[str, Benchmark]:
    """All benchmarks by their names."""
    for module in MODULES:
        importlib.import_module(f"mmpo_jax.evaluation.{module}")
    return dict(sorted(_BENCHMARKS.items()))


def find_benchmark(name: str) -> Benchmark:
    """A benchmark by its name.

    Raises:
      MmpoError: there is none of this name; which there are.
    """
    known = benchmarks()
    if name not in known:
        raise MmpoError(f"there is no benchmark {name!r}, only {', '.join(known)}")
    return known[name]


def score_answers(
    name: str, data: str, answers: str, output: str, options: Mapping[str, Any] | None = None
) -> Scores:
    """Scores the answers of a file and writes what comes out.

    Args:
      name: of the benchmark.
      data: folder of its published files.
      answers: file of the answers.
      output: JSON file: `benchmark`, `metrics`, `beside`, `options`, `rows`.
      options: of the benchmark, by name.

    Raises:
      MmpoError: naming a file or row that is missing or of no use.
    """
    chosen = find_benchmark(name)
    check_reachable(epath.Path(output).parent)
    for name_of, given in (("--data", data), ("--responses", answers)):
        if os.path.realpath(given) == os.path.realpath(output):
            raise MmpoError(f"--output {output} is the file of {name_of}; give another one")
    files = Files(epath.Path(data), chosen.source)
    if not files.root.exists():
        raise MmpoError(f"{data}: there is no such folder; the files are part of {chosen.source}")
    rows = read_table(epath.Path(answers))
    if not rows:
        raise MmpoError(f"{answers}: has no rows")
    scores = chosen.score(files, rows, **(options or {}))
    report = {
        "benchmark": name,
        "metrics": scores.metrics,
        "beside": scores.beside,
        "options": {
            key: (options or {}).get(key, default) for key, (_, default) in chosen.options.items()
        },
        "rows": scores.rows,
    }
    text = json.dumps(null_if_not_finite(report), indent=1, ensure_ascii=False)
    write_atomic(output, text.encode())
    return scores


def share(part: float, whole: float) -> float:
    """part / whole; NaN of nothing."""
    return part / whole if whole else math.nan


def lines(scores: Scores) -> Iterator[str]:
    """What a person reads of scores."""
    width = max(map(len, [*scores.metrics, *scores.beside]))
    for name, value in scores.metrics.items():
        yield f"{name:{width}s}  {value:.4f}"
    if scores.beside:
        yield "beside them:"
    for name, value in scores.beside.items():
        yield f"{name:{width}s}  {value:.4f}" if value % 1 else f"{name:{width}s}  {value:.0f}"
