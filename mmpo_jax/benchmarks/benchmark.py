"""The registry of benchmarks: what a model is asked, and what its answers are worth.

A benchmark is a module with one registered function (files, answers, **options) -> `Scores`, or
(files, answers, judge, **options) where a model judges the answers (`judging.py`). It
reads the files as their authors publish them, computes what the official script computes, quirks
included, under the official names, and says beside it what misleads. Nothing here runs a model.

    METRICS = (Metric("Accuracy", "more", guards="accuracy"), Metric("Yes ratio"))

    def questions(files: Files, *, suffix: str = "") -> list[Asked]: ...

    @benchmark(source="github.com/...", answers="...", metrics=METRICS, asks=questions)
    def name(files: Files, answers: Sequence[Row], *, reading: Reading = "official") -> Scores: ...

Its module is one of `MODULES`. Keyword arguments of both functions are its options: keys of its
section under `evaluation:` in a recipe, and those of the second one `--rule` of the command. With
`asks` a model can be measured by it: the answers are written as rows {"id", "response"} and scored
by the same function as anybody's. `metrics` are what runs show of it and compare, in tables, curves
and warnings; for that, rows of its `Scores` have `scores`, see there.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

from etils import epath

from mmpo_jax.benchmarks.tables import Row, read_table
from mmpo_jax.core.errors import MmpoError
from mmpo_jax.core.known_files import kept_fingerprint
from mmpo_jax.core.sections import keyword_options
from mmpo_jax.data.formats.media import MediaFolder
from mmpo_jax.data.records import ImageRef, Record
from mmpo_jax.data.skipped import UnusableRow

MODULES = (
    "amber",
    "chair",
    "llava_bench",
    "mm_rlhf_rewardbench",
    "mm_rlhf_safetybench",
    "mmhal",
    "mmstar",
    "multimodal_rewardbench",
    "object_halbench",
    "picture_world",
    "pope",
    "refomb",
    "vl_rewardbench",
)
"""Modules of this package that register a benchmark."""
PICTURE = "picture"
"""In rows of scores of a model that was asked: number of the picture that the question is about."""


@dataclasses.dataclass(frozen=True)
class Scores:
    """What a benchmark says of answers."""

    metrics: Mapping[str, float]
    """By the official names, in the official unit, not rounded; NaN where a denominator is 0."""
    beside: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """What the metrics do not show: answers that could not be read, shares of "no", lengths."""
    rows: Sequence[Mapping[str, Any]] = ()
    """What became of every answer, as JSON, with its `id`. A row's `scores` say what it adds to
    metrics, by their names: x, or [x, y]. A metric is the sum of x over the rows by that of y,
    which is 1 where it is not given; so two runs are compared row by row."""
    made_with: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """What computed them besides this library, with versions: word lists, models, judges."""


@dataclasses.dataclass(frozen=True)
class Metric:
    """A number of `Scores.metrics` or `Scores.beside` that runs show and compare."""

    name: str
    better: Literal["more", "less"] | None = None
    """Which way is better; None where neither is."""
    form: str = ".3f"
    """Format of its values."""
    guards: Literal["recall", "length", "accuracy", "reading"] | None = None
    """What is lost where it gets worse, of which runs warn: things that are mentioned, words,
    knowledge, or answers that can be read."""
    heading: str = ""
    """Of its column, where that is another than the name."""
    column: bool = True
    """Whether it has one in the table of a run's rounds."""
    curve: bool | str = False
    """Whether it is drawn over the rounds of a run; metrics with one title share a panel."""

    @property
    def panel(self) -> str:
        """Title of the panel in which it is drawn; empty where it is not."""
        return (self.heading or self.name) if self.curve is True else self.curve or ""


@dataclasses.dataclass(frozen=True)
class Asked:
    """Records that a model answers in one way."""

    records: Sequence[Record]
    """With a prompt, and ids of their own."""
    max_new_tokens: int
    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0
    seed: int = 0
    """Seed of the samples."""
    name: str = ""
    """Where a benchmark asks in several ways: ids of answers are `NAME/ID` then."""
    reads: Literal["text", "yes_no"] = "text"
    """What an answer is: a text, or the more likely of "yes" and "no", without a text."""


@dataclasses.dataclass(frozen=True)
class Files:
    """The published files of a benchmark."""

    root: epath.Path
    """Their folder, or one of them."""
    source: str
    """Where users get them."""
    images: epath.Path | None = None
    """Folder of the images, where a model is asked."""
    images_source: str = ""
    """Where users get those."""
    found: dict[str, epath.Path] = dataclasses.field(default_factory=dict, compare=False)
    """The files that were asked for so far, by their names in the folder."""

    @property
    def folder(self) -> epath.Path:
        """Their folder, also where one of them was named."""
        return self.root if self.root.is_dir() else self.root.parent

    def find(self, *patterns: str) -> list[epath.Path]:
        """The files of the first pattern that has any, in the order of their names.

        Raises:
          MmpoError: there are none.
        """
        if not self.root.is_dir() and self.root.exists():
            self.found[self.root.name] = self.root
            return [self.root]
        for pattern in patterns:
            found = sorted(self.root.glob(pattern))
            if found:
                self.found.update({str(path.relative_to(self.root)): path for path in found})
                return found
        raise MmpoError(
            f"{self.root}: has no {' or '.join(patterns)}; the file is part of {self.source}"
        )

    def digests(self) -> dict[str, str]:
        """SHA-256 of the files that were asked for so far, by name."""
        return {name: kept_fingerprint(path) for name, path in sorted(self.found.items())}

    def are(self, digests: Mapping[str, str]) -> bool:
        """Whether files are what they were, see `digests`."""
        paths = {self.folder / name: digest for name, digest in digests.items()}
        return all(
            path.exists() and kept_fingerprint(path) == digest for path, digest in paths.items()
        )

    def rows(self, *patterns: str) -> list[Row]:
        """The rows of those files, one file after the other.

        Raises:
          MmpoError: there is no such file, or it cannot be read.
        """
        return [row for path in self.find(*patterns) for row in read_table(path)]

    def image(self, row: Row, *keys: str) -> ImageRef:
        """The image that a row has under the first of the keys: its bytes, or a path in the folder
        of images, or else in that of the files.

        Raises:
          MmpoError: the row has none, or it is not there.
        """
        try:
            return MediaFolder(self.images or self.folder, "images").image(row.need(*keys))
        except UnusableRow as error:
            told = f"{row.name}: {error.detail}"
            if self.images_source:
                told += f"; these are the images of {self.images_source}"
            raise MmpoError(told) from error


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A benchmark by its name."""

    name: str
    score: Callable[..., Scores]
    source: str
    """Where users get its files; empty where it has none."""
    answers: str
    """What rows of answers have, in words."""
    metrics: tuple[Metric, ...] = ()
    """Those that runs show, in order."""
    asks: Callable[..., Sequence[Asked]] | None = None
    """What a model is asked, of (files, **options); None where no model can be asked."""
    images: str = ""
    """Where users get the images of its questions."""
    judgements: str | None = None
    """What rows of judgements have that the authors' scripts keep, in words; None where nobody
    judges."""
    unjudged: tuple[str, str] | None = None
    """(option, value) with which nobody judges, if there is one."""

    @property
    def asking_options(self) -> dict[str, tuple[Any, Any]]:
        """What can be chosen of its questions: name -> (type, default)."""
        return {} if self.asks is None else keyword_options(self.asks)

    @property
    def options(self) -> dict[str, tuple[Any, Any]]:
        """Its rules that can be chosen: name -> (type, default)."""
        return keyword_options(self.score)

    def files(self, data: str | None, images: str | None = None) -> Files:
        """Its files in a folder of the user's.

        Args:
          data: the folder, or one of the files.
          images: folder of the images, where a model is asked.

        Raises:
          MmpoError: there is no such folder, or one is given and the benchmark has no files.
        """
        if not self.source:
            if data is not None:
                raise MmpoError(f"{data}: {self.name} has no files; leave `data` out")
            return Files(epath.Path("."), "")
        if data is None:
            raise MmpoError(f"{self.name}: `data` names the folder of its files: {self.source}")
        for folder in (data, *([] if images is None else [images])):
            if not epath.Path(folder).exists():
                source = self.source if folder == data else self.images
                raise MmpoError(
                    f"{folder}: there is no such folder; the files are part of {source}"
                )
        place = None if images is None else epath.Path(images)
        return Files(epath.Path(data), self.source, place, self.images)

    @property
    def summary(self) -> str:
        """The docstring's first paragraph, in one line."""
        return (inspect.getdoc(self.score) or "").split("\n\n")[0].replace("\n", " ")


_BENCHMARKS: dict[str, Benchmark] = {}


def benchmark(
    source: str,
    answers: str,
    metrics: Sequence[Metric] = (),
    asks: Callable[..., Sequence[Asked]] | None = None,
    images: str = "",
    judgements: str | None = None,
    unjudged: tuple[str, str] | None = None,
) -> Callable[[Callable[..., Scores]], Callable[..., Scores]]:
    """Registers a benchmark under its function's name; arguments as in `Benchmark`."""

    def add(function: Callable[..., Scores]) -> Callable[..., Scores]:
        name = function.__name__
        _BENCHMARKS[name] = Benchmark(
            name, function, source, answers, (*metrics,), asks, images, judgements, unjudged
        )
        return function

    return add


def benchmarks() -> dict[str, Benchmark]:
    """All benchmarks by their names."""
    for module in MODULES:
        importlib.import_module(f"mmpo_jax.benchmarks.{module}")
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


def share(part: float, whole: float) -> float:
    """part / whole; NaN of nothing."""
    return part / whole if whole else math.nan


def mean_words(texts: Iterable[str | None]) -> float:
    """Words of a text, between blanks, on average; those that are not known are left out."""
    known = [text for text in texts if text is not None]
    return share(sum(len(text.split()) for text in known), len(known))
