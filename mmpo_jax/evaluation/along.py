"""A training measured by benchmarks: at its steps, and the table of gains and losses at the end."""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

from mmpo_jax.checkpoints.checkpoint import load_checkpoint
from mmpo_jax.checkpoints.train_state import TrainState
from mmpo_jax.core.files import fingerprint_json, write_atomic, write_json
from mmpo_jax.core.processes import on_one
from mmpo_jax.evaluation.answers import Measuring
from mmpo_jax.evaluation.measure import (
    Measured,
    all_values,
    measure,
    read_measured,
    shown_metrics,
)
from mmpo_jax.evaluation.tax import FILE, START, alignment_tax, render_tax
from mmpo_jax.models.lora import cast_params
from mmpo_jax.recipes.evaluation import BenchmarkSection
from mmpo_jax.training.metrics import FILE as METRICS
from mmpo_jax.training.metrics import read_metrics
from mmpo_jax.training.stage import TrainingStage
from mmpo_jax.training.step import whole_params
from mmpo_jax.training.validation import Measurements, best_row

log = logging.getLogger(__name__)

EVALUATION = "evaluation"
"""Folder of a run in which answers and scores of benchmarks are, by step."""
TEXT = "tax.txt"


def along_training(
    sections: Sequence[BenchmarkSection],
    every: int | None,
    stage: TrainingStage,
    identity: Mapping[str, Any],
) -> Measurements:
    """What benchmarks say of a training's steps, in `evaluation/step-NUMBER/` of its folder.

    A step's weights follow from what the run is made of, so answers that a run gave before it was
    killed are those that it would give again.

    Args:
      sections: the benchmarks.
      every: steps between measurements.
      stage: of the training.
      identity: all that its weights depend on.
    """

    def measure_step(step: int, state: TrainState) -> dict[str, float]:
        checkpoint = dataclasses.replace(
            stage.start,
            params=cast_params(whole_params(state), stage.training.compute_dtype),
            fingerprint=fingerprint_json([identity, step]),
        )
        folder = _step_folder(stage.run_folder, step)
        measured = measure(sections, Measuring(checkpoint, stage.mesh, folder, stage.lengths))
        for one in measured:
            shown = [metric for metric in one.benchmark.metrics if metric.column]
            values = {**one.scores.beside, **one.scores.metrics}
            told = [f"{m.heading or m.name} {format(values[m.name], m.form)}" for m in shown]
            log.info("step %d  %s: %s", step, one.name, ", ".join(told))
        return all_values(measured)

    return Measurements(measure_step, every)


def write_tax(
    sections: Sequence[BenchmarkSection], stage: TrainingStage, result: str, attention: str
) -> dict[str, Any]:
    """Compares all steps that were measured, and the result where that is none of them; writes
    `tax.json` and `tax.txt`, and says in the log what fell.

    Args:
      sections: the benchmarks.
      stage: of a training that is over.
      result: folder of its model.
      attention: of the recipe.
    """
    rows = on_one(lambda: read_metrics(os.path.join(stage.run_folder, METRICS)))
    best = rows[-1] if stage.validation is None else best_row(rows, stage.validation)
    chosen = int(best.get("step", 0))
    shown = shown_metrics(sections)
    steps = [int(row["step"]) for row in rows if shown[0].key in row]
    measured: dict[str, list[Measured]] = {}
    for step in steps:
        read = functools.partial(read_measured, sections, _step_folder(stage.run_folder, step))
        measured[_name(step)] = on_one(read)
    if chosen not in steps:
        checkpoint = load_checkpoint(result, stage.mesh, attention)
        at = Measuring(
            checkpoint, stage.mesh, _step_folder(stage.run_folder, chosen), stage.lengths
        )
        measured[_name(chosen)] = measure(sections, at)
    return on_one(lambda: _write(stage.run_folder, alignment_tax(measured, shown, _name(chosen))))


def _write(folder: str, tax: dict[str, Any]) -> dict[str, Any]:
    write_json(os.path.join(folder, FILE), tax)
    text = "\n".join([render_tax(tax), "", *tax["warnings"], ""])
    write_atomic(os.path.join(folder, TEXT), text.encode())
    for warning in tax["warnings"]:
        log.warning("%s", warning)
    return tax


def _name(step: int) -> str:
    return f"step {step}" if step else START


def _step_folder(folder: str, step: int) -> str:
    return os.path.join(folder, EVALUATION, f"step-{step:06d}")
