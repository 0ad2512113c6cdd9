"""Files of questions and answers for benchmarks' scorers, and where published ones are."""

import json
import math
import os

import pytest

from mmpo_jax.benchmarks.benchmark import find_benchmark
from mmpo_jax.benchmarks.score_files import score_answers

published = pytest.mark.skipif(
    "MMPO_EVALUATION_DATA" not in os.environ,
    reason="MMPO_EVALUATION_DATA does not name a folder of benchmarks' files",
)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def scored(name, tmp_path, questions, answers, **options):
    """Scores of rows that are written to files first."""
    folder = tmp_path / "data"
    folder.mkdir(exist_ok=True)
    if questions is not None:
        write(folder / "questions.jsonl", questions)
    given = write(tmp_path / "answers.jsonl", answers)
    return score_answers(name, str(folder), given, str(tmp_path / "out.json"), options)


def assert_rows_add_up(name, scores, tolerance=1e-9):
    """Whether the rows of some scores give each metric of their benchmark that runs compare."""
    for metric in find_benchmark(name).metrics:
        parts = [row["scores"][metric.name] for row in scores.rows]
        sums = [x if isinstance(x, list) else (x, 1) for x in parts]
        value = {**scores.metrics, **scores.beside}[metric.name]
        above, below = (math.fsum(column) for column in zip(*sums, strict=True))
        if below and not math.isnan(value):  # which scripts have no number for
            expected = pytest.approx(value, rel=1e-6, abs=tolerance)
            assert above / below == expected, metric.name
