"""What is known of a training before it starts: its steps, rows, rows at a time, what cannot be."""

from __future__ import annotations

import re
from collections.abc import Sequence

from jax.sharding import Mesh

from mmpo_jax.core.errors import MmpoError
from mmpo_jax.core.trees import flatten
from mmpo_jax.data.pipeline import MixtureEntry, num_batches, seen_rows
from mmpo_jax.models.lora import targeted_layers
from mmpo_jax.models.model import Model
from mmpo_jax.parallel.mesh import batch_shards
from mmpo_jax.recipes.training import Training
from mmpo_jax.training.step import trainable_paths


class TrainingError(MmpoError):
    """Training cannot start, or had to stop."""


def check_training(config: Training, model: Model, mesh: Mesh) -> None:
    """What can be known to be wrong before anything heavy starts.

    Raises:
      TrainingError: the batch does not fit the mesh, or `freeze` or `lora.target` the model.
    """
    micro_batch_size(config, mesh)
    try:
        trainable_paths(list(flatten(model.abstract_params())), config.freeze)
    except (ValueError, re.error) as error:
        message = str(error).removeprefix("freeze: ")
        raise TrainingError(f"training.freeze: {message}") from error
    if config.lora is not None:
        try:
            targeted_layers(model, config.lora.target, config.freeze)
        except ValueError as error:
            raise TrainingError(f"training.lora.target: {error}") from error


def total_steps(config: Training, parts: Sequence[MixtureEntry], updates: int = 1) -> int:
    """How many updates a run takes, so many with every batch.

    Raises:
      TrainingError: there is nothing to train on.
    """
    if not all(part.size for part in parts):
        raise TrainingError("no row is left to train on")
    rows = sum(part.per_epoch for part in parts)
    steps = num_batches(rows, config.epochs, config.batch_size) * updates
    return min(steps, config.max_steps or steps)


def rows_to_see(config: Training, parts: Sequence[MixtureEntry], seed: int) -> set[int] | None:
    """Indices of the rows that a run which `max_steps` ends early reads; None for all.

    Args:
      config: the recipe's training section.
      parts: the data sets that stand one after another.
      seed: of the order, as `train` has it.
    """
    if config.max_steps is None:
        return None
    steps = total_steps(config, parts)
    return seen_rows(parts, seed, config.epochs, config.batch_size, steps)


def micro_batch_size(config: Training, mesh: Mesh) -> int:
    """Rows at a time over all devices.

    Raises:
      TrainingError: they cannot be split evenly over the mesh.
    """
    micro = config.micro_batch_size or config.batch_size
    shards = batch_shards(mesh)
    if micro % shards:
        raise TrainingError(
            f"training: {micro} rows at a time cannot be split over {shards} devices; "
            "make batch_size (or micro_batch_size) a multiple of it"
        )
    return micro
