"""`mmpo evaluate --benchmark NAME`: the numbers of a benchmark for answers that are there."""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml
from pydantic import TypeAdapter, ValidationError

from mmpo_jax.benchmarks.benchmark import Benchmark, Scores, find_benchmark
from mmpo_jax.benchmarks.judging import HOW, Judge
from mmpo_jax.benchmarks.score_files import score_answers
from mmpo_jax.core.errors import MmpoError


def main(options: argparse.Namespace, start_jax: Callable[[], None]) -> None:
    """
    Args:
      options: of the command line.
      start_jax: starts it, where a checkpoint judges.
    """
    chosen = find_benchmark(options.benchmark)
    if options.responses is None:
        print("\n".join(described(chosen)))
        return
    rules = parse_rules(chosen, options.rule)
    with _judge(chosen, options, start_jax) as judge:
        scores = score_answers(
            options.benchmark, options.data, options.responses, options.output, rules, judge
        )
    print("\n".join(lines(scores)))
    answered, questions = (scores.beside.get(name, 0) for name in ("answers", "questions"))
    if answered < questions and "answers" in scores.beside:
        print(f"warning: {answered:.0f} of {questions:.0f} questions have an answer")
    without = scores.beside.get("without_judgement", 0)
    if without:
        print(f"warning: {without:.0f} answers have no judgement and are left out of the numbers")
    for name, told in judge.told.items():
        models = ", ".join(f"{model} ({count})" for model, count in told["models"].items())
        who = models or "a model that the file does not name"
        print(f"{name}: judged by {who}; the authors ask {told['official_judge']}")
    print(f"scores: {options.output}")


@contextlib.contextmanager
def _judge(
    benchmark: Benchmark, options: argparse.Namespace, start_jax: Callable[[], None]
) -> Iterator[Judge]:
    """The judge of the command line.

    Raises:
      MmpoError: the benchmark has none, or its options are wrong.
    """
    if benchmark.judgements is None and (options.judge or options.judgements):
        flag = "--judge" if options.judge else "--judgements"
        raise MmpoError(f"{flag}: nobody judges answers to {benchmark.name}")
    if not options.judge:
        yield Judge(given=options.judgements)
        return
    from mmpo_jax.evaluation.judge_models import asked_judge  # takes seconds
    from mmpo_jax.recipes.files import load_recipe
    from mmpo_jax.recipes.judging import CheckpointJudging, JudgedAnswers

    path = next((text for text in options.judge if os.path.exists(text)), None)
    overrides = [f"judge.{text}" for text in options.judge if text != path]
    recipe = load_recipe(JudgedAnswers, path, overrides, "this judge cannot be asked")
    if isinstance(recipe.judge, CheckpointJudging):
        start_jax()
    folder = f"{os.path.splitext(options.output)[0]}.judge"
    with asked_judge(recipe.judge, folder, options.judgements) as judge:
        yield judge


def lines(scores: Scores) -> Iterator[str]:
    """What a person reads of scores."""
    width = max(map(len, [*scores.metrics, *scores.beside]))
    for name, value in scores.metrics.items():
        yield f"{name:{width}s}  {value:.4f}"
    if scores.beside:
        yield "beside them:"
    for name, value in scores.beside.items():
        yield f"{name:{width}s}  {value:.4f}" if value % 1 else f"{name:{width}s}  {value:.0f}"
    for name, told in scores.made_with.items():
        yield f"made with {name}: {told}"


def described(benchmark: Benchmark) -> list[str]:
    """What a benchmark takes and gives, for a person."""
    told = [
        f"{benchmark.name}: {benchmark.summary}",
        f"  files: {benchmark.source or 'none, so no --data'}",
        f"  answers: {benchmark.answers}",
    ]
    if benchmark.judgements is not None:
        told += [
            f"  judgements: {benchmark.judgements}",
            f"  {HOW} (docs/evaluation.md)",
        ]
    for name, (kind, default) in benchmark.options.items():
        told.append(f"  --rule {name}={default}  ({_choices(kind)})")
    return told


def _choices(kind: Any) -> str:
    """What an option may be, in words."""
    if get_origin(kind) is Literal:
        return ", ".join(get_args(kind))
    plain = get_args(kind)[0] if get_origin(kind) is Annotated else kind
    return getattr(plain, "__name__", str(plain))


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
