"""The training loop: batches in, checkpoints and metrics out, exact resume."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mmpo_jax.data.pipeline import Example, HostBatch, num_batches, training_batches
from mmpo_jax.data.processor import Processor
from mmpo_jax.errors import MmpoError
from mmpo_jax.models.card import ModelCard
from mmpo_jax.models.huggingface import flatten
from mmpo_jax.models.lora import add_adapters, targeted_layers
from mmpo_jax.models.model import Model, Params
from mmpo_jax.parallel.mesh import batch_shards, put_batch
from mmpo_jax.recipe import Lengths, MovingReference, Rollout, Training
from mmpo_jax.training.checkpoints import Checkpoints, save_base
from mmpo_jax.training.losses import make_loss, needs_reference
from mmpo_jax.training.metrics import MetricsWriter
from mmpo_jax.training.on_policy import Rollouts
from mmpo_jax.training.optimizer import make_optimizer, make_schedule
from mmpo_jax.training.step import create_state, make_step, merge, trainable_paths


class TrainingError(MmpoError):
    """Training cannot start, or had to stop."""


def train(
    model: Model,
    params: Params,
    processor: Processor,
    examples: Sequence[Example],
    config: Training,
    lengths: Lengths,
    mesh: Mesh,
    *,
    folder: str,
    identity: str,
    seed: int,
    card: ModelCard | None = None,
    rollout: Rollout | None = None,
) -> Params:
    """Runs one stage of training, from the last checkpoint in `folder` if there is one.

    Args:
      model: the architecture.
      params: what training starts from; not changed.
      processor: of the same checkpoint.
      examples: the data, tokenized, with the fields the objective needs.
      config: the recipe's training section.
      lengths: bucket sizes.
      mesh: the devices.
      folder: checkpoints, `metrics.jsonl` and TensorBoard events go here.
      identity: fingerprint of model, data and recipe; checkpoints of another one are refused.
      seed: order of the data, first values and dropout of adapters.
      card: of the result, kept beside the checkpoints.
      rollout: how responses are sampled and rewarded, where the examples have none.

    Returns:
      The whole parameters, float32 where they were trained; with adapters beside the kernels if
      the recipe has `lora`.

    Raises:
      TrainingError: there is no data, the batch does not fit the mesh, `freeze` does not fit the
        model, or a step was not finite.
    """
    check_training(config, model, mesh)
    steps = total_steps(config, len(examples), rollout.updates_per_rollout if rollout else 1)
    lora = config.lora
    if lora is not None:
        params = add_adapters(params, model, lora, config.freeze, seed)
    micro = micro_batch_size(config, mesh)
    schedule = make_schedule(config.optimizer, steps)
    optimizer = make_optimizer(config.optimizer, schedule)
    checkpoints = Checkpoints(folder, identity, config.keep_checkpoints)
    rollouts = None
    if rollout is not None:
        prompts = [example.contexts[0] for example in examples]
        rollouts = Rollouts(
            model,
            processor,
            prompts,
            config,
            rollout,
            lengths,
            mesh,
            micro_batch_size=micro,
            seed=seed,
        )
    batches: Any = rollouts or training_batches(
        examples,
        processor,
        lengths,
        seed=seed,
        epochs=config.epochs,
        batch_size=config.batch_size,
        micro_batch_size=micro,
    )
    # Closed whatever happens: a checkpoint that is being written is finished first.
    with jax.set_mesh(mesh), contextlib.closing(checkpoints):
        dtype, dropout = jnp.dtype(config.compute_dtype), lora.dropout if lora else 0.0
        terms = [section.term() for section in config.objective]
        loss = make_loss(model, terms, remat=config.remat)
        moving = config.reference if isinstance(config.reference, MovingReference) else None
        running = {"online": dtype, "ema": jnp.float32}.get(config.reference.type)
        state = create_state(
            params,
            model,
            optimizer,
            config.freeze,
            mesh,
            reference_dtype=running if needs_reference(terms) else None,
            keeps=loss.state,
        )
        update = make_step(loss, optimizer, schedule, state, dtype, dropout, seed, moving)
        restored = checkpoints.restore(state)
        if restored is not None:
            state, position = restored
            batches.set_state(position)
        # Not before it is known to be this run's folder.
        save_base(folder, processor.folder, processor.chat_template, card)
        first = int(state.step)
        with contextlib.closing(MetricsWriter(folder, first, steps)) as writer:
            window: list[tuple[int, tuple[str, ...], dict[str, Any]]] = []
            started = time.perf_counter()
            for step in range(first + 1, steps + 1):
                host: HostBatch = rollouts.draw(state) if rollouts else next(batches)
                state, metrics = update(state, put_batch(host.arrays, mesh, leading=1))
                window.append((step, host.ids, metrics | dict(host.metrics)))
                writer.advance()
                if step % config.log_every and step != steps:
                    continue
                values = _fetch(window, checkpoints)
                rate = len(window) / (time.perf_counter() - started)
                writer.report(step, values, rate)
                window, started = [], time.perf_counter()
                if step % config.save_every == 0 or step == steps:
                    checkpoints.save(step, state, batches.get_state())
        return merge(state)


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


def total_steps(config: Training, num_examples: int, updates: int = 1) -> int:
    """How many updates a run takes, so many with every batch.

    Raises:
      TrainingError: there is nothing to train on.
    """
    if not num_examples:
        raise TrainingError("no row is left to train on")
    steps = num_batches(num_examples, config.epochs, config.batch_size) * updates
    return min(steps, config.max_steps or steps)


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


def _fetch(
    window: list[tuple[int, tuple[str, ...], dict[str, Any]]], checkpoints: Checkpoints
) -> dict[str, float]:
    """Means over the steps since the last report; stops at the first that was not finite."""
    rows = jax.device_get([metrics for _, _, metrics in window])
    for (step, ids, _), row in zip(window, rows, strict=True):
        if not row["finite"]:
            raise TrainingError(
                f"step {step}: the loss is {row['loss']} and the gradient norm {row['grad_norm']}; "
                f"rows of this batch: {', '.join(ids)}; "
                f"last good checkpoint: {checkpoints.describe_latest()}"
            )
    names = [name for name in rows[0] if name != "finite"]
    return {name: float(np.mean([row[name] for row in rows])) for name in names}
