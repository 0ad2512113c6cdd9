"""What is known of a training before it starts: its steps, rows, rows at a time, what cannot be."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from mmpo_jax.core.errors import MmpoError
from mmpo_jax.core.trees import flatten
from mmpo_jax.data.pipeline import MixtureEntry, num_batches, seen_rows
from mmpo_jax.models.config import DecoderConfig, HeadKind, ModelConfig, ModelError
from mmpo_jax.models.lora import check_experts, targeted_layers
from mmpo_jax.models.model import Model
from mmpo_jax.models.quantized_base import quantized_paths
from mmpo_jax.models.reward_head import with_reward_head
from mmpo_jax.objectives.registry import HEADS
from mmpo_jax.objectives.terms import reads_log_probs, rows_read
from mmpo_jax.parallel.choice import choose_sizes
from mmpo_jax.parallel.mesh import batch_shards
from mmpo_jax.recipes.base import Devices
from mmpo_jax.recipes.rollout import Rollout
from mmpo_jax.recipes.training import Training
from mmpo_jax.training.losses import recipe_terms
from mmpo_jax.training.step import trainable_paths

log = logging.getLogger(__name__)


class TrainingError(MmpoError):
    """Training cannot start, or had to stop."""


def mesh_sizes(
    sizes: Devices, config: Training, decoder: DecoderConfig, devices: Sequence[Any] | None = None
) -> dict[str, Any]:
    """Sizes of the mesh of a recipe that trains: those that it gives, or where it gives none those
    that its batch and its model need, which the log says with the reason.

    Args:
      sizes: the recipe's section.
      config: its training section.
      decoder: of the model.
      devices: all by default.
    """
    if sizes != Devices():
        return sizes.model_dump()
    rows = config.micro_batch_size or config.batch_size
    choice = choose_sizes(jax.devices() if devices is None else devices, rows, decoder)
    log.info("`devices` is left out: %s", choice.why)
    return dict(choice.sizes)


def check_training(config: Training, model: Model, mesh: Mesh) -> None:
    """What can be known to be wrong before anything heavy starts.

    Raises:
      TrainingError: the batch does not fit the mesh, or the objectives, `freeze` or `lora.target`
        the model.
    """
    micro_batch_size(config, mesh)
    _check_head(config, model)
    _check_balance(config, model)
    _check_quantization(config, model)
    try:
        trainable_paths(list(flatten(model.abstract_params())), config.freeze)
    except (ValueError, re.error) as error:
        message = str(error).removeprefix("freeze: ")
        raise TrainingError(f"training.freeze: {message}") from error
    if config.lora is not None:
        try:
            layers = targeted_layers(model, config.lora.target, config.freeze)
            check_experts(layers, config.lora)
        except ValueError as error:
            raise TrainingError(f"training.lora.target: {error}") from error


def trained_config(config: Training, new_head: HeadKind | None, model: ModelConfig) -> ModelConfig:
    """The config of what a stage trains: with its new reward head, if the recipe makes one, and the
    prompt that its objectives ask for critiques with.

    Args:
      config: the recipe's training section.
      new_head: type of the new head, if there is one.
      model: config of what the stage starts from.

    Raises:
      ModelError: a new head would take the place of one that is there.
    """
    scored = rows_read(recipe_terms(config)).scored
    if scored is None:
        return with_reward_head(model, new_head, None)
    return with_reward_head(model, new_head, scored.critique_prompt, scored.layout)


def _check_balance(config: Training, model: Model) -> None:
    if not config.router_aux_loss_coef:
        return
    if not model.config.decoder.experts:
        raise TrainingError("training.router_aux_loss_coef: the model has no experts to balance")
    if not reads_log_probs(recipe_terms(config)):
        raise TrainingError("training.router_aux_loss_coef: a reward model's training has none")


def _check_quantization(config: Training, model: Model) -> None:
    if config.quantization is None:
        return
    if model.config.reward_head is not None:
        raise TrainingError("training.lora.quantize_base: a reward model's base is not quantised")
    try:
        quantized_paths(model)
    except ModelError as error:
        raise TrainingError(f"training.{error}") from error


def _check_head(config: Training, model: Model) -> None:
    has_head = model.config.reward_head is not None
    for section in config.objective:
        needs_head = bool(section.term().needs & HEADS.keys())
        if needs_head and not has_head:
            raise TrainingError(
                f"training.objective: {section.type} needs a model with a reward head, and this "
                "one has none; `reward_head: linear` (or `two_layer`) in the recipe makes a new one"
            )
        if has_head and not needs_head:
            raise TrainingError(
                f"training.objective: {section.type} is of policies, and the model is a reward "
                "model; give the checkpoint that it was trained from"
            )
        if section.type == "critique" and not (
            model.config.decoder.tie_word_embeddings or model.config.decoder.language_head
        ):
            raise TrainingError(
                "training.objective: critique needs a language-model head, and this reward model "
                "has none; train with bradley_terry alone, or start from a language model"
            )


def total_steps(
    config: Training, parts: Sequence[MixtureEntry], rollout: Rollout | None = None
) -> int:
    """How many updates a run takes.

    Args:
      config: the recipe's training section.
      parts: the data sets that stand one after another.
      rollout: how responses are sampled, if they are.

    Raises:
      TrainingError: there is nothing to train on.
    """
    if not all(part.size for part in parts):
        raise TrainingError("no row is left to train on")
    rows = sum(part.per_epoch for part in parts)
    minibatches, steps_each = (1, 1) if rollout is None else (rollout.minibatches, rollout.steps)
    batches = num_batches(rows, config.epochs, config.batch_size * minibatches)
    steps = batches * steps_each
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
        data = mesh.shape["data"]
        way_out = f"make batch_size (or micro_batch_size) a multiple of {shards}"
        if micro % data == 0:
            fsdp = math.gcd(micro // data, mesh.size // data)
            way_out += (
                ", or split rows over fewer of them and weights over all: "
                f"devices.data={data} devices.fsdp={fsdp} devices.tensor=-1"
            )
        raise TrainingError(
            f"training: {micro} rows at a time cannot be split over {shards} devices; {way_out}"
        )
    return micro
