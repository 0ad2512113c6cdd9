"""`mmpo evaluate --benchmark NAME`: the numbers of a benchmark for answers that are there."""

from __future__ import annotations

import argparse
from typing import get_args

import yaml
from pydantic import TypeAdapter, ValidationError

from mmpo_jax.benchmarks.benchmark import Benchmark, find_benchmark, lines, score_answers
from mmpo_jax.core.errors import MmpoError


def main(options: argparse.Namespace) -> None:
    chosen = find_benchmark(options.benchmark)
    if options.data is None:
        print("\n".join(described(chosen)))
        return
    rules = parse_rules(chosen, options.rule)
    scores = score_answers(
        options.benchmark, options.data, options.responses, options.output, rules
    )
    print("\n".join(lines(scores)))
    print(f"scores: {options.output}")


def described(benchmark: Benchmark) -> list[str]:
    """What a benchmark takes and gives, for a person."""
    told = [
        f"{benchmark.name}: {benchmark.summary}",
        f"  files: {benchmark.source}",
        f"  answers: {benchmark.answers}",
    ]
    for name, (kind, default) in benchmark.options.items():
        choices = ", ".join(get_args(kind)) or kind.__name__
        told.append(f"  --rule {name}={default}  ({choices})")
    return told


def parse_rules(benchmark: Benchmark, given: list[str]) -> dict[str, object]:
    """Options of a benchmark that stand on the command line as `name=value`.

    Raises:
      MmpoError: the benchmark has no such option, or not with this value.
    """
    found: dict[str, object] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or name not in benchmark.options:
            known = ", ".join(benchmark.options) or "none"
            raise MmpoError(f"--rule {text}: {benchmark.name} has the rules: {known}")
        kind, _ = benchmark.options[name]
        try:
            found[name] = TypeAdapter(kind).validate_python(yaml.safe_load(value), strict=True)
        except ValidationError as error:
            raise MmpoError(f"--rule {text}: {error.errors()[0]['msg']}") from error
        except yaml.YAMLError as error:
            raise MmpoError(f"--rule {text}: {value} is no value") from error
    return found
