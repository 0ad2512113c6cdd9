"""What a model answers to the questions of a benchmark, in stages of a folder."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
import os
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
from etils import epath
from jax.sharding import Mesh

from mmpo_jax.benchmarks.benchmark import Asked
from mmpo_jax.checkpoints.checkpoint import Checkpoint
from mmpo_jax.core.errors import MmpoError
from mmpo_jax.core.files import fingerprint_items, write_atomic
from mmpo_jax.core.processes import on_one
from mmpo_jax.core.stages import Stage, run_told_stage
from mmpo_jax.data.agreement import check_same_records
from mmpo_jax.data.batching import fitting_lengths
from mmpo_jax.data.lengths import Lengths
from mmpo_jax.data.media_check import check_images
from mmpo_jax.data.records import Record
from mmpo_jax.data.tokenization import TokenizedRecord, tokenize_prompt, tokenize_records
from mmpo_jax.data.usable import unsupported
from mmpo_jax.feedback.labeler import CheckpointLabeler, QuestionSet
from mmpo_jax.feedback.scores import accepted
from mmpo_jax.generation.responses import generate_stage
from mmpo_jax.recipes.evaluation import BenchmarkSection
from mmpo_jax.recipes.sampling import Decoding

IMAGES_PER_PART = 256
"""A kill loses the yes/no answers about at most this many images."""
YES_NO_RULES = 1
"""Part of the key of yes/no answers: changes with what makes them."""


@dataclasses.dataclass(frozen=True)
class Measuring:
    """What measures a model, and where."""

    checkpoint: Checkpoint
    """The model; its parameters on the mesh, or to be read."""
    mesh: Mesh
    folder: str
    """Folder of answers and scores."""
    lengths: Lengths | None = None
    """Bucket sizes that the run has anyway, for questions that fit them."""


def asked_records(asked: Sequence[Asked], most: int) -> list[Record]:
    """The first questions of every way of asking, so many of each, with the ids of answers."""
    return [
        dataclasses.replace(record, id=_prefix(one) + record.id)
        for one in asked
        for record in one.records[:most]
    ]


def _prefix(asked: Asked) -> str:
    """What stands in front of the ids of answers."""
    return f"{asked.name}/" if asked.name else ""


def write_answers(section: BenchmarkSection, asked: Sequence[Asked], at: Measuring) -> str:
    """Asks a model all questions of a benchmark.

    Returns:
      The file of the answers, `NAME.answers.jsonl`, in the layout that `mmpo evaluate --responses`
      reads: rows `{"id", "response"}`, and the probabilities of yes and no where these were asked.

    Raises:
      MmpoError: naming a question that the model cannot be asked, and why.
    """
    rows: list[dict[str, Any]] = []
    for one in asked:
        answer = _texts if one.reads == "text" else _more_likely
        name = "-".join(filter(None, [section.called, one.name]))
        found = answer(one, name, section.batch_size, at)
        rows += [{**row, "id": _prefix(one) + row["id"]} for row in found]
    path = os.path.join(at.folder, f"{section.called}.answers.jsonl")
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    on_one(lambda: None if _says(path, lines) else write_atomic(path, lines.encode()))
    return path


def _says(path: str, lines: str) -> bool:
    file = epath.Path(path)
    return file.exists() and file.read_bytes() == lines.encode()


def _texts(asked: Asked, name: str, batch_size: int, at: Measuring) -> list[dict[str, Any]]:
    """Texts that the model writes."""
    records = _tokenized(asked, name, at)
    decoding = Decoding(
        temperature=asked.temperature, top_p=asked.top_p, max_new_tokens=asked.max_new_tokens
    )
    table = generate_stage(
        at.checkpoint,
        records,
        decoding,
        _lengths(records, at.lengths),
        at.mesh,
        folder=at.folder,
        batch_size=batch_size,
        seed=asked.seed,
        name=name,
    ).table
    pairs = zip(table["prompt_id"].to_pylist(), table["text"].to_pylist(), strict=True)
    return [{"id": record_id, "response": text} for record_id, text in pairs]


def _more_likely(asked: Asked, name: str, batch_size: int, at: Measuring) -> list[dict[str, Any]]:
    """The more likely of yes and no, for questions that stand next to others about an image."""
    _tokenized(asked, name, at)
    groups = [
        list(group) for _, group in itertools.groupby(asked.records, key=lambda each: each.media)
    ]
    items = [_question_set(group) for group in groups]
    checkpoint = at.checkpoint
    stage = Stage(
        folder=at.folder,
        name=name,
        inputs={
            "model": checkpoint.fingerprint,
            "questions": fingerprint_items(
                [item[0], [media.fingerprint() for media in item[1]], item[2]] for item in items
            ),
            **checkpoint.processor.fingerprints(),
        },
        settings={"rules": YES_NO_RULES},
        num_parts=max(1, -(-len(items) // IMAGES_PER_PART)),
    )

    @functools.cache
    def labeler() -> CheckpointLabeler:
        loaded = checkpoint.reloaded(at.mesh)
        return CheckpointLabeler(loaded, at.mesh, at.lengths, batch_size=batch_size)

    def make_part(part: int) -> pa.Table:
        some = slice(part * IMAGES_PER_PART, (part + 1) * IMAGES_PER_PART)
        answers = labeler().answer(items[some])
        pairs = [
            (record.id, answer)
            for group, of_group in zip(groups[some], answers, strict=True)
            for record, answer in zip(group, of_group, strict=True)
        ]
        return pa.Table.from_pylist(
            [{"id": of, "p_yes": one.p_yes, "p_no": one.p_no} for of, one in pairs],
            schema=_PROBABILITIES,
        )

    rows = run_told_stage(stage, make_part).table.to_pylist()
    return [{**row, "response": _word(row["p_yes"], row["p_no"])} for row in rows]


_PROBABILITIES = pa.schema([("id", pa.string()), ("p_yes", pa.float64()), ("p_no", pa.float64())])


def _question_set(records: Sequence[Record]) -> QuestionSet:
    first = records[0]
    return first.id, first.media, tuple(record.prompt[-1].text for record in records)


def _word(p_yes: float, p_no: float) -> str:
    """The more likely word; an empty one where the model could not be asked."""
    if math.isnan(p_yes) or math.isnan(p_no):
        return ""
    return "yes" if accepted(p_yes, p_no) else "no"


def _lengths(records: Sequence[TokenizedRecord], given: Lengths | None) -> Lengths:
    """The given bucket sizes where all prompts fit, else those that they need."""
    longest = max(len(record.prompt_ids) for record in records)
    return given if given and longest <= given.prompt[-1] else fitting_lengths(records)


def _tokenized(asked: Asked, name: str, at: Measuring) -> list[TokenizedRecord]:
    """All questions as tokens.

    Raises:
      MmpoError: one cannot be asked, and a score without it would be another one; or another
        process has other questions.
    """
    _, broken = check_images(asked.records, name)
    problems = [(row.id, row.detail) for row in broken]
    processor = at.checkpoint.processor
    for record in asked.records:
        if problem := unsupported(record, processor):
            problems.append((record.id, problem[1]))
    if not problems:
        found, skipped = tokenize_records(asked.records, processor, None, name, tokenize_prompt)
        problems = [(row.id, row.detail) for row in skipped]
    if problems:
        (place, why), more = problems[0], len(problems) - 1
        others = f"; and {more} other questions cannot be asked" if more else ""
        raise MmpoError(f"{name}: question {place!r}: {why}{others}")
    check_same_records(name, found)
    return found
