"""A stage of training from rows to a saved model, for `mmpo train` and for a round of alignment."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

from jax.sharding import Mesh

from mmpo_jax.checkpoints.cards import ModelCard
from mmpo_jax.checkpoints.checkpoint import Checkpoint
from mmpo_jax.checkpoints.locations import fingerprint_location, locate
from mmpo_jax.core import progress
from mmpo_jax.core.processes import on_one
from mmpo_jax.data.examples import Example
from mmpo_jax.data.lengths import Lengths
from mmpo_jax.data.pipeline import MixtureEntry
from mmpo_jax.data.tokenization import TokenizedRecord
from mmpo_jax.recipes.rollout import Rollout
from mmpo_jax.recipes.teacher import ModelTeacher
from mmpo_jax.recipes.train_recipe import Validation
from mmpo_jax.recipes.training import Training
from mmpo_jax.training.batches import TrainingData
from mmpo_jax.training.examples import prepare_examples
from mmpo_jax.training.loop import Run, train
from mmpo_jax.training.metrics import FILE, read_metrics, reproducible
from mmpo_jax.training.on_policy import prompt_examples
from mmpo_jax.training.plan import rows_to_see
from mmpo_jax.training.saving import save_result
from mmpo_jax.training.validation import Held, best_row

VALIDATION = "validation"
"""Folder of what belongs to held-out rows."""


@dataclasses.dataclass(frozen=True)
class TrainingStage:
    """What a stage of training is made of, but for its rows."""

    start: Checkpoint
    """What is trained, and the reference."""
    training: Training
    """The recipe's section."""
    lengths: Lengths
    mesh: Mesh
    folder: str
    """Folder of the reference's log-probs and of the result, see `save_result`."""
    run_folder: str
    """Folder of checkpoints and metrics."""
    seed: int
    """Seed of the order of the rows, and of first values and dropout of adapters."""
    name: str
    """What trackers call it."""
    card: ModelCard
    """Card of the result, without metrics."""
    validation: Validation | None = None
    """What is made of held-out rows, if any are held out."""
    rollout: Rollout | None = None
    """How responses are sampled and rewarded, where the rows are prompts."""
    begun: float = dataclasses.field(default_factory=time.time)
    """When it was begun now, in seconds since 1970."""

    def identity(self) -> dict[str, Any]:
        """All that the result depends on beside the rows, as JSON."""
        identity: dict[str, Any] = {
            "model": self.start.fingerprint,
            **self.start.processor.fingerprints(),
            "training": self.training.identity(),
            "lengths": self.lengths.model_dump(mode="json"),
            "seed": self.seed,
        }
        if self.validation is not None:
            identity["validation"] = self.validation.model_dump(mode="json", exclude={"data"})
        if self.rollout is not None:
            identity["rollout"] = self.rollout.identity()
            functions = [section.key() for section in self.rollout.rules if section.of_user]
            if functions:
                identity["functions"] = functions
            models = [section.model for section in self.rollout.reward_models]
            if models:
                prints = [fingerprint_location(locate(name)) for name in models]
                identity["reward models"] = prints
        teacher = self.training.teacher
        if isinstance(teacher, ModelTeacher):
            identity["teacher"] = fingerprint_location(locate(teacher.model))
        return identity


def stage_data(
    stage: TrainingStage,
    records: Sequence[TokenizedRecord],
    parts: Sequence[MixtureEntry] = (),
    held: Sequence[TokenizedRecord] = (),
) -> TrainingData:
    """Rows as a stage learns from them, with the reference's log-probs where these are computed
    before it.

    Args:
      stage: that learns.
      records: that it learns from.
      parts: the data sets that stand one after another in them, if there are several.
      held: rows that are measured.

    Raises:
      DataError: the data lack a field that an objective needs, or hold log-probs of a reference
        that is another model.
    """
    parts = parts or [MixtureEntry(len(records))]
    seen = rows_to_see(stage.training, parts, stage.seed)
    examples = _examples(stage, records, stage.folder, seen)
    measured = None
    if stage.validation is not None:
        folder = os.path.join(stage.folder, VALIDATION)
        measured = Held(_examples(stage, held, folder, None), stage.validation)
    return TrainingData(examples, parts, measured, stage.rollout)


def _examples(
    stage: TrainingStage,
    records: Sequence[TokenizedRecord],
    folder: str,
    seen: set[int] | None,
) -> Sequence[Example]:
    if stage.rollout is not None:
        return prompt_examples(records, stage.training)
    return prepare_examples(
        stage.start,
        records,
        stage.training,
        stage.lengths,
        stage.mesh,
        folder=folder,
        seen=seen,
    )


def train_stage(stage: TrainingStage, data: TrainingData, identity: Mapping[str, Any]) -> str:
    """Trains, goes on with a training that was stopped, and saves the result with its card.

    Args:
      stage: from which model, with which options. Its start is let go of, see `train`.
      data: of `stage_data`.
      identity: the stage's and what its rows are made of; checkpoints of another are refused.

    Returns:
      The Hugging Face folder of the result.

    Raises:
      TrainingError: see `train`.
    """
    trained = train(
        stage.start,
        data,
        stage.training,
        stage.lengths,
        stage.mesh,
        Run(stage.run_folder, identity, stage.seed, stage.name, stage.card, stage.begun),
    )
    rows = on_one(lambda: read_metrics(os.path.join(stage.run_folder, FILE))) or [{}]
    measured: Mapping[str, float] = rows[-1]
    if stage.validation is not None:
        measured = best_row([row for row in rows if row["step"] == trained.step], stage.validation)
    examples = data.examples if data.held is None else data.held.examples
    with progress.doing("saving the model"):
        return save_result(
            stage.folder,
            stage.start,
            trained.params,
            stage.training,
            stage.lengths,
            dataclasses.replace(stage.card, metrics=reproducible(measured)),
            stage.mesh,
            [] if stage.rollout is not None else examples,
        )
