"""The training loop: batches in, checkpoints and metrics out, exact resume."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mmpo_jax.checkpoints.below import save_below
from mmpo_jax.checkpoints.cards import ModelCard
from mmpo_jax.checkpoints.checkpoint import Checkpoint
from mmpo_jax.checkpoints.orbax import save_base
from mmpo_jax.checkpoints.run_checkpoints import Checkpoints
from mmpo_jax.checkpoints.steps import CheckpointError
from mmpo_jax.checkpoints.train_state import TrainState, abstract
from mmpo_jax.core import progress
from mmpo_jax.core.errors import MmpoError, Stopped
from mmpo_jax.core.processes import is_agreed, several
from mmpo_jax.data.lengths import Lengths
from mmpo_jax.data.pipeline import held_out_batches
from mmpo_jax.data.train_batch import HostBatch, TrainBatch
from mmpo_jax.inference.plan import packed_over
from mmpo_jax.models.lora import add_adapters
from mmpo_jax.models.model import Params
from mmpo_jax.parallel.mesh import batch_share, put_batch
from mmpo_jax.recipes.rollout import Rollout
from mmpo_jax.recipes.training import MovingReference, Training
from mmpo_jax.training.batches import Batches, TrainingData, make_batches
from mmpo_jax.training.goodput import Goodput, first_start
from mmpo_jax.training.losses import Loss, compared_with, make_loss, recipe_terms
from mmpo_jax.training.memory import log_memory
from mmpo_jax.training.metrics import MetricsWriter, from_json
from mmpo_jax.training.not_finite import Recorder
from mmpo_jax.training.optimizer import make_optimizer, make_schedule
from mmpo_jax.training.performance import measure
from mmpo_jax.training.plan import TrainingError, check_training, micro_batch_size, total_steps
from mmpo_jax.training.profiling import Profiler
from mmpo_jax.training.reports import Reports, StartedStep
from mmpo_jax.training.step import Update, create_state, make_step, whole_params
from mmpo_jax.training.stopping import StopSignal
from mmpo_jax.training.teacher import LoadedTeacher
from mmpo_jax.training.tracking import track_run
from mmpo_jax.training.validation import Held, Validator

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Run:
    """A stage of training as its folder knows it."""

    folder: str
    """Checkpoints, `metrics.jsonl` and TensorBoard events go here."""
    identity: Mapping[str, Any]
    """Model, data and recipe, as JSON; checkpoints of another run are refused."""
    seed: int
    """Order of the data, first values and dropout of adapters."""
    name: str = "training"
    """What trackers call it."""
    card: ModelCard | None = None
    """Card of the result, kept beside the checkpoints."""
    begun: float = dataclasses.field(default_factory=time.time)
    """When it was begun now, in seconds since 1970."""


@dataclasses.dataclass(frozen=True)
class Trained:
    """The result of a stage of training."""

    params: Params
    """Whole, float32 where they were trained; with adapters beside the kernels if the recipe has
    `lora`."""
    step: int
    """After which they are these."""


def train(
    start: Checkpoint,
    data: TrainingData,
    config: Training,
    lengths: Lengths,
    mesh: Mesh,
    run: Run,
) -> Trained:
    """Runs one stage of training, from the last checkpoint in the run's folder if there is one.

    Args:
      start: what training starts from. Before the first step it is let go of (`Checkpoint.release`)
        but for frozen parameters that the state shares.
      data: what it learns from.
      config: the recipe's training section.
      lengths: bucket sizes.
      mesh: the devices.
      run: its folder, its identity and its seed.

    Returns:
      The parameters of the step where held-out rows were best, of those in `best/` that are whole,
      or of the last one.

    Raises:
      TrainingError: there is no data, the batch does not fit the mesh, `freeze` does not fit the
        model, or a step was not finite: then the state before it is saved.
      CheckpointError: a checkpoint cannot be written, or none of those that are there is whole.
      Stopped: SIGTERM came, and a checkpoint was saved.
    """
    check_training(config, start.model, mesh)
    if start.quantization != config.quantization:
        raise TrainingError(
            f"training.lora.quantize_base is {config.quantization}, and the start was loaded with "
            f"{start.quantization}"
        )
    rollout = data.rollout
    steps = total_steps(config, data.mixture, rollout)
    teacher = LoadedTeacher.load(config, start, mesh)
    checkpoints = Checkpoints(run.folder, run.identity, config.keep_checkpoints)
    source = make_batches(start, data, config, lengths, mesh, run.seed, teacher)
    # Closed whatever happens: a checkpoint that is being written is finished first.
    with jax.set_mesh(mesh), _closing(checkpoints):
        loss = make_loss(
            start.model,
            recipe_terms(config),
            data.examples[0].names,
            config.remat,
            1.0 if rollout is None else rollout.temperature,
            config.router_aux_loss_coef,
            None if teacher is None else teacher.model,
        )
        with progress.doing("placing parameters, reading the last checkpoint"):
            begin = Beginning(start, loss, config, rollout, mesh, steps, run.seed, teacher)
            state, update, position, window = _begin(begin, checkpoints)
        if position is not None:
            source.set_state(position)
        # Not before it is known to be this run's folder.
        processor = start.processor
        save_base(
            *(run.folder, processor.folder, processor.chat_template, run.card, start.model),
            quantized_base=start.quantized_base,
        )
        if start.below is not None:
            save_below(run.folder, start.below)
        first = first_start(run.folder, run.identity, run.begun)
        track = functools.partial(track_run, config.wandb, run.name, first.id, run.identity)
        log_memory(state)
        step = int(state.step)
        with (
            _writing(
                MetricsWriter(run.folder, -1 if position is None else step, steps, track)
            ) as writer,
            progress.doing("training", steps, "steps", "compiling") as activity,
            StopSignal(mesh) as stop,
            contextlib.closing(Profiler(config.profile, run.folder)) as profiler,
        ):
            activity.start_at(step)
            validator = make_validator(start, data.held, config, lengths, mesh, writer.rows)
            goodput = Goodput(first.time, writer.rows)
            performance = measure(start.model, state, recipe_terms(config), mesh, goodput, teacher)
            reports = Reports(
                config,
                steps,
                checkpoints,
                writer,
                validator,
                data.measurements,
                performance,
                Recorder(run.folder, mesh, source.draw_again),
                position or source.get_state(),
                from_json(window),
            )
            if position is None:
                reports.begin(state)
            else:
                reports.resume(step, state)
            times = performance.times
            while step < steps and not reports.is_over():
                profiler.before(step + 1)
                host, position, batch = times.fetch(
                    functools.partial(_next_batch, source, state, mesh),
                    lambda: source.seconds,
                )
                state, metrics = times.start(update, state, batch)
                step += 1
                profiler.after(step, metrics["loss"])
                reports.add(StartedStep(step, host.ids, {**metrics, **host.metrics}, position))
                performance.add(host.amounts, host.taught)
                activity.reach(step - 1)  # the one before is done
                if reports.is_due(step):
                    activity.reach(step)
                    reports.report(step, state, position)
                if stop.is_agreed() and step < steps and source.can_resume():
                    reports.save_and_stop(step, state, position)
            # While the last step ran, or one after which training is over: the caller would go on.
            if stop.is_agreed_in_the_end():
                reports.save_and_stop(step, state, position or source.get_state())
            performance.log_summary()
        result = step
        if validator is not None:
            result, state = reports.best_whole(validator, state) or (step, state)
            validator.log_summary(step, steps, result)
            checkpoints.best.keep({result, *validator.best_steps()})
        return Trained(whole_params(state), result)


@contextlib.contextmanager
def _closing(checkpoints: Checkpoints) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        # Processes finish a checkpoint together, and the others may wait elsewhere.
        if several() and not isinstance(error, Stopped) and not is_agreed(error):
            raise
        try:
            _finish(checkpoints)
        except CheckpointError as second:
            if isinstance(error, Stopped):  # which says that all is saved
                raise
            log.warning("%s", second)
        raise
    _finish(checkpoints)


@contextlib.contextmanager
def _writing(writer: MetricsWriter) -> Iterator[MetricsWriter]:
    """Closes it at the end; that this fails hides no other error."""
    try:
        yield writer
    except BaseException as error:
        try:
            writer.close()
        except MmpoError as second:
            if isinstance(error, Stopped):  # which says that all is saved
                raise
            log.warning("%s", second)
        raise
    writer.close()


def _finish(checkpoints: Checkpoints) -> None:
    with progress.doing("finishing checkpoints"):
        checkpoints.close()


def make_validator(
    start: Checkpoint,
    held: Held | None,
    config: Training,
    lengths: Lengths,
    mesh: Mesh,
    rows: Sequence[Mapping[str, float]],
) -> Validator | None:
    """What measures held-out rows, if there are any; `rows` are of `metrics.jsonl` so far."""
    if held is None:
        return None
    micro = micro_batch_size(config, mesh)
    make = functools.partial(
        held_out_batches,
        held.examples,
        start.processor,
        lengths,
        micro,
        packed_over(start.model, mesh),
        batch_share(mesh),
    )
    # In its own contexts: some row may have more than any that is trained on.
    loss = make_loss(start.model, recipe_terms(config), held.examples[0].names)
    count = -(-len(held.examples) // micro)
    return Validator(held.config, make, loss, config, mesh, rows, count)


@dataclasses.dataclass(frozen=True)
class Beginning:
    """What the first state and the step of a stage are made of."""

    start: Checkpoint
    loss: Loss
    config: Training
    rollout: Rollout | None
    mesh: Mesh
    steps: int
    """Of the whole stage."""
    seed: int
    teacher: LoadedTeacher | None = None


def _begin(
    beginning: Beginning, checkpoints: Checkpoints
) -> tuple[TrainState, Update, dict[str, Any] | None, list[dict[str, Any]]]:
    """(the state to go on from, the compiled step, the data position if that is a checkpoint's, its
    window), with nothing on the devices beside the state.
    """
    start = beginning.start
    state, update = _prepare(beginning)
    if checkpoints.latest() is None:
        start.release(state.params)  # what is frozen is the state's too
        return state, update, None, []
    shapes = abstract(state)
    if start.quantization is not None:  # no checkpoint has the base
        shapes = dataclasses.replace(shapes, frozen=state.frozen)
    start.release()
    del state
    state, position, window = checkpoints.restore(shapes)
    return state, update, position, window


def _prepare(beginning: Beginning) -> tuple[TrainState, Update]:
    """(the state of step 0, the compiled step)."""
    config, loss, seed, teacher = (
        beginning.config,
        beginning.loss,
        beginning.seed,
        beginning.teacher,
    )
    model, params = beginning.start.model, beginning.start.params
    if config.lora is not None:
        params = add_adapters(params, model, config.lora, config.freeze, seed)
    schedule = make_schedule(config.schedule, config.optimizer.learning_rate, beginning.steps)
    optimizer = make_optimizer(config.optimizer, schedule, model.config.decoder.vocab_size)
    dtype = jnp.dtype(config.compute_dtype)
    reference = compared_with(config, beginning.rollout)
    running = {"online": dtype, "ema": jnp.float32}.get(reference.type)
    state = create_state(
        params,
        model,
        optimizer,
        config.freeze,
        beginning.mesh,
        param_dtype=jnp.dtype(config.param_dtype),
        reference_dtype=running,
        keeps=loss.state,
    )
    update = make_step(
        loss,
        optimizer,
        schedule,
        state,
        dtype,
        config.lora.dropout if config.lora else 0.0,
        seed,
        reference if isinstance(reference, MovingReference) else None,
        None if teacher is None else teacher.params,
    )
    return state, update


def _next_batch(
    source: Batches, state: TrainState, mesh: Mesh
) -> tuple[HostBatch, dict[str, Any], TrainBatch]:
    """(the next batch, where the data stand after it, the batch on the devices)."""
    host = source.draw(state)
    return host, source.get_state(), put_batch(host.arrays, mesh, leading=1)
