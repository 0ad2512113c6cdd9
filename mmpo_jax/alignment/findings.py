"""What is known of the models of an alignment, round by round, and which is the result."""

from __future__ import annotations

import dataclasses
import functools
import os

from mmpo_jax.alignment.report import RoundReport, write_report
from mmpo_jax.alignment.selection import HeldOut, best_round, judge_held_out, tell_choice
from mmpo_jax.checkpoints.checkpoint import Checkpoint
from mmpo_jax.core import progress
from mmpo_jax.core.files import write_json
from mmpo_jax.core.processes import on_one
from mmpo_jax.evaluation.answers import Measuring
from mmpo_jax.evaluation.measure import (
    Measured,
    Shown,
    all_values,
    describe,
    measure,
    shown_metrics,
)
from mmpo_jax.evaluation.tax import START, alignment_tax
from mmpo_jax.feedback.judge import Judge
from mmpo_jax.feedback.models import Models
from mmpo_jax.recipes.align_recipe import AlignRecipe

EVALUATION = "evaluation"
"""Folder of a round in which answers and scores of benchmarks are."""


@dataclasses.dataclass
class Findings:
    """What is measured of every model, the start's first."""

    recipe: AlignRecipe
    judge: Judge
    """That of the rounds."""
    models: Models
    """What judges ask."""
    held: HeldOut | None
    """Prompts that choose the result, if any do."""
    reports: list[RoundReport] = dataclasses.field(default_factory=list)
    measured: dict[str, list[Measured]] = dataclasses.field(default_factory=dict)
    """What benchmarks say, by the names of the table of gains and losses."""
    held_out: dict[int, dict[str, float]] = dataclasses.field(default_factory=dict)
    """What the judge says of answers to held-out prompts, by round."""

    @functools.cached_property
    def shown(self) -> list[Shown]:
        """The metrics of the benchmarks."""
        return shown_metrics(self.recipe.evaluation or ())

    @property
    def result(self) -> int:
        """The number of the round whose model is the result so far."""
        return best_round(self.held_out, self.recipe.selection)

    def look_at(self, index: int, checkpoint: Checkpoint) -> dict[str, float]:
        """Measures the model of a round; its values by name."""
        self.models.held = checkpoint
        self.measured[_name(index)] = evaluate_round(index, checkpoint, self.recipe, self.models)
        self.held_out[index] = {}
        if self.held is not None:
            folder = round_folder(self.recipe, index)
            self.held_out[index] = judge_held_out(
                self.held, checkpoint, self.judge, self.recipe, self.models.mesh, folder
            )
        return all_values(self.measured[_name(index)]) | self.held_out[index]

    def add(self, report: RoundReport) -> None:
        """Adds the line of a round, and from the first round on writes the report so far."""
        self.reports.append(report)
        if report.index:
            on_one(self._write)

    def tell_result(self) -> None:
        """Says in the log which model is the result, where it was chosen."""
        if self.recipe.selection is not None:
            tell_choice(self.held_out, self.recipe.selection, self.result)

    def _write(self) -> None:
        tax = None
        if self.shown:
            tax = alignment_tax(self.measured, self.shown, _name(self.result))
        write_report(self.recipe.output, self.reports, self.shown, tax)


def evaluate_round(
    index: int, checkpoint: Checkpoint, recipe: AlignRecipe, models: Models
) -> list[Measured]:
    """What the recipe's benchmarks say of a round's model, see `evaluation.measure`; the values are
    also in `evaluation.json` of the round."""
    if recipe.evaluation is None:
        return []
    folder = round_folder(recipe, index)
    at = Measuring(checkpoint, models.mesh, os.path.join(folder, EVALUATION), recipe.lengths)
    with progress.doing("evaluate"):
        progress.tell()
        measured = measure(recipe.evaluation, at)
    told = describe(measured, shown_metrics(recipe.evaluation))
    on_one(lambda: write_json(os.path.join(folder, f"{EVALUATION}.json"), told))
    return measured


def round_folder(recipe: AlignRecipe, index: int) -> str:
    """Where a round keeps its files."""
    return os.path.join(recipe.output, f"round-{index}")


def _name(index: int) -> str:
    """What the table of gains and losses calls a round's model."""
    return f"round {index}" if index else START
