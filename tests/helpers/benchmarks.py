"""Files of questions and answers for benchmarks' scorers, and where published ones are."""

import json
import os

import pytest

from mmpo_jax.evaluation.benchmark import score_answers

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
