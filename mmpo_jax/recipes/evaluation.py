"""What a model is measured by: a section for every benchmark that asks one."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Annotated, Any

import pydantic
from pydantic import Field

from mmpo_jax.benchmarks.benchmark import Benchmark, Files, benchmarks, find_benchmark
from mmpo_jax.core.sections import PositiveInt, Section, any_of, section_of
from mmpo_jax.recipes.judging import BenchmarkJudge


class BenchmarkSection(Section):
    """One benchmark, with its options beside these."""

    type: str
    name: str | None = Field(None, pattern=r"^[a-z0-9_-]+$")
    """Of its files and its columns; its type by default. Needed where a benchmark stands twice."""
    batch_size: PositiveInt = 16
    """Questions at a time."""

    @property
    def called(self) -> str:
        """Its name in a run."""
        return self.name or self.type

    @property
    def benchmark(self) -> Benchmark:
        """What it is of."""
        return find_benchmark(self.type)

    def files(self) -> Files:
        """Its files, see `Benchmark.files`."""
        return self.benchmark.files(None)

    def options(self, names: Any) -> dict[str, Any]:
        """Its values of some of the benchmark's options."""
        return {name: getattr(self, name) for name in names}


class PublishedSection(BenchmarkSection):
    """One benchmark whose questions are in files."""

    data: str
    """Folder of its files as they are published, or one of them."""
    images: str | None = None
    """Folder of the images of its questions; the files' own by default."""

    def files(self) -> Files:
        return self.benchmark.files(self.data, self.images)


class JudgedSection(PublishedSection):
    """One benchmark whose answers a model judges."""

    judge: BenchmarkJudge | None = None
    """Who judges, see docs/evaluation.md."""

    @pydantic.model_validator(mode="after")
    def _has_a_judge(self) -> JudgedSection:
        option, value = self.benchmark.unjudged or ("", "")
        if self.judge is None and not (option and getattr(self, option) == value):
            without = f", or `{option}: {value}`" if option else ""
            raise ValueError(f"judge: name one, as `judge: {{url: ..., model: ...}}`{without}")
        return self


def _section(benchmark: Benchmark) -> type[BenchmarkSection]:
    """The section of a benchmark; an option of both its functions is one."""
    asking, scoring = benchmark.asking_options, benchmark.options
    both = asking.keys() & scoring.keys()
    assert all(asking[name] == scoring[name] for name in both), f"{benchmark.name}: {both}"
    base: type[BenchmarkSection] = BenchmarkSection
    if benchmark.source:
        base = PublishedSection if benchmark.judgements is None else JudgedSection
    return section_of(base, benchmark.name, benchmark.summary, {**asking, **scoring})


def _named_apart(sections: tuple[BenchmarkSection, ...]) -> tuple[BenchmarkSection, ...]:
    counts = Counter(section.called for section in sections)
    repeated = [name for name, count in counts.items() if count > 1]
    if repeated:
        raise ValueError(f"two benchmarks are called {repeated[0]}; give one another `name`")
    return sections


SECTIONS = {
    name: _section(benchmark)
    for name, benchmark in benchmarks().items()
    if benchmark.asks is not None
}

if TYPE_CHECKING:
    Benchmarks = tuple[BenchmarkSection, ...]
else:
    Benchmarks = Annotated[any_of(SECTIONS.values()), pydantic.AfterValidator(_named_apart)]
    """A list of benchmarks, or one of them, by `type`."""
