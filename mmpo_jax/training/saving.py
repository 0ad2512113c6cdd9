"""A run's result as a Hugging Face folder, and how much of the training its dtype keeps."""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mmpo_jax.checkpoints.cards import MARGIN, ModelCard, SavedWeights, write_card
from mmpo_jax.checkpoints.checkpoint import Checkpoint, Origin
from mmpo_jax.checkpoints.huggingface import load_params, save_model
from mmpo_jax.checkpoints.locations import locate
from mmpo_jax.checkpoints.peft import save_adapter
from mmpo_jax.checkpoints.train_state import TrainState
from mmpo_jax.checkpoints.weights import load_model_config
from mmpo_jax.core.errors import MmpoError
from mmpo_jax.core.trees import flatten
from mmpo_jax.data.examples import Example
from mmpo_jax.data.lengths import Lengths
from mmpo_jax.data.pipeline import held_out_batches
from mmpo_jax.inference.plan import packed_over
from mmpo_jax.models.lora import Lora
from mmpo_jax.models.model import Model, Params
from mmpo_jax.parallel.mesh import batch_share, placed_shapes
from mmpo_jax.recipes.training import RUNNING, SaveDtype, Training
from mmpo_jax.training.losses import compared_with, make_loss, recipe_terms
from mmpo_jax.training.plan import micro_batch_size
from mmpo_jax.training.validation import make_forward, measure_batches

log = logging.getLogger(__name__)

MODEL, ADAPTER = "model", "adapter"
"""Folders of a run's result in its output folder."""

MEASURED_ROWS = 64
"""Number of rows, at most, that are run through the saved weights."""

Measure = Callable[[Params], tuple[int, Mapping[str, float]]]
"""parameters -> (rows, metrics of them), see `measure_weights`; no row where there is nothing to
measure."""


@dataclasses.dataclass(frozen=True)
class Before:
    """What an update is counted from."""

    params: Params | None
    unknown: str = ""
    """Why there are none."""


def load_before(card: ModelCard, model: Model, mesh: Mesh) -> Before:
    """What a run started from, quantised where it was, if it is still where its recipe found it.

    Args:
      card: of the run.
      model: the architecture.
      mesh: the devices.
    """
    name = card.base_model
    if not card.base_fingerprint:
        return Before(None, f"the run does not say what {name} was when it started")
    is_random = card.recipe.get("weights") == "random"
    try:
        location = locate(name)
        is_new = model.config.reward_head is not None and not is_random
        is_new = is_new and load_model_config(location).reward_head is None
        seed = card.recipe["seed"]
        origin = Origin(location, seed if is_random else None, seed if is_new else None)
        if origin.fingerprint(model.config) != card.base_fingerprint:
            return Before(None, f"{name} is not what the run started from")
        lora = card.recipe["training"].get("lora") or {}  # old cards have no `quantize_base`
        return Before(origin.load(model, mesh, quantization=lora.get("quantize_base")))
    except MmpoError as error:
        return Before(None, f"{name} cannot be read: {error}")


def save_result(
    output: str,
    start: Checkpoint,
    trained: Params,
    training: Training,
    lengths: Lengths,
    card: ModelCard,
    mesh: Mesh,
    examples: Sequence[Example],
) -> str:
    """Writes the trained model, and of adapters also themselves.

    Where its dtype is narrower than that of the training, the start model is read again, as far as
    the training has let go of it, and what is left of the update and of the margin is measured.

    Args:
      output: gets `model/`, a Hugging Face folder with adapters merged, and `adapter/` in PEFT's
        format if there are any.
      start: what the training began with; adapters belong to it.
      trained: parameters, with adapters beside kernels if the recipe has `lora`.
      training: the recipe's section.
      lengths: bucket sizes.
      card: of the model; what is measured of the saved weights is added.
      mesh: the devices.
      examples: see `measure_weights`.

    Returns:
      The Hugging Face folder.
    """
    if training.lora is not None:
        save_adapters(output, start, trained, training.lora)
    target, dtype = os.path.join(output, MODEL), training.save_dtype
    before = Before(None)
    if dtype != "float32":
        try:
            start = start.reloaded(mesh)
            before = Before(start.params)
        except MmpoError as error:  # a result must not be lost to that
            before, examples = Before(None, str(error)), []
    measure = functools.partial(measure_weights, start, examples, training, lengths, mesh)
    save_weights(target, start, before, trained, dtype, card, mesh, measure, output)
    return target


def save_adapters(output: str, start: Checkpoint, trained: Params, lora: Lora) -> None:
    """Writes `adapter/` in PEFT's format, of the model that training began with."""
    base = (start.hub_id or start.folder) if start.below is None else start.below.model
    folder = os.path.join(output, ADAPTER)
    save_adapter(folder, start.model, trained, base=base, dropout=lora.dropout)


def save_weights(
    target: str,
    start: Checkpoint,
    before: Before,
    trained: Params,
    dtype: SaveDtype,
    card: ModelCard,
    mesh: Mesh,
    measure: Measure,
    run: str,
) -> SavedWeights:
    """Writes a Hugging Face folder, and says in log and card what its dtype keeps.

    Nothing is measured where nothing is rounded.

    Args:
      target: the folder.
      start: of this architecture and with this processor.
      before: what the update is counted from.
      trained: float32 where trained; adapters are merged.
      dtype: of the files.
      card: of the model.
      mesh: the devices.
      measure: run with the trained and then with the saved parameters.
      run: folder of the run that has the weights unrounded, for whoever wants them.

    Returns:
      What the dtype keeps.
    """
    share = save_model(
        target,
        start.model,
        trained,
        start.processor.folder,
        dtype=dtype,
        before=None if dtype == "float32" else before.params,
        card=dataclasses.replace(card, saved=SavedWeights(dtype)),
        chat_template=start.processor.chat_template,
        quantized_base=start.quantized_base,
    )
    saved = SavedWeights(dtype, share, unknown="" if dtype == "float32" else before.unknown)
    if dtype != "float32":
        places = placed_shapes(start.model.abstract_params(), start.model.rules, mesh)
        read = load_params(target, start.model, places)  # as whoever loads it has it
        saved = _compare(saved, measure(trained), measure(read))
        write_card(target, dataclasses.replace(card, saved=saved))
    tell_saved(target, saved, run)
    return saved


def tell_saved(folder: str, saved: SavedWeights, run: str) -> None:
    """Says in the log what is left of the training in a folder, and which run has all of it."""
    log.info("%s: %s", folder, " ".join(saved.lines()))
    if saved.is_lossy():
        log.warning(
            "%s: much of the training is lost or changed in %s: `save_dtype: float32` keeps "
            "all of it, and so does `mmpo convert %s TARGET --dtype float32`",
            folder,
            saved.dtype.partition("_")[0],
            run,
        )


def _compare(
    saved: SavedWeights,
    of_run: tuple[int, Mapping[str, float]],
    as_saved: tuple[int, Mapping[str, float]],
) -> SavedWeights:
    """The saved weights with the margin of both, or the loss where there is no margin."""
    rows, values = of_run
    if not rows:
        return saved
    metric = MARGIN if MARGIN in values else "loss"
    return dataclasses.replace(
        saved, metric=metric, rows=rows, of_run=values[metric], as_saved=as_saved[1][metric]
    )


def measure_weights(
    start: Checkpoint,
    examples: Sequence[Example],
    training: Training,
    lengths: Lengths,
    mesh: Mesh,
    params: Params,
) -> tuple[int, dict[str, float]]:
    """The metrics of training of some rows under given weights, in the run's compute dtype.

    Args:
      start: what the training began with: the reference where one runs along.
      examples: as they were trained on, with cached or given log-probs; `MEASURED_ROWS` evenly
        spread ones are taken. None where responses are sampled.
      training: the recipe's section.
      lengths: bucket sizes.
      mesh: the devices.
      params: on the mesh, with adapters or without.

    Returns:
      (rows, metrics).
    """
    # Of rows that `max_steps` keeps the run from there is no reference.
    known = [
        place
        for place, example in enumerate(examples)
        if all(np.isfinite(values).all() for values in example.reference.values())
    ]
    if not known:
        return 0, {}
    places = np.linspace(0, len(known) - 1, min(len(known), MEASURED_ROWS)).astype(int)
    chosen = [examples[known[place]] for place in places]
    terms = recipe_terms(training)
    loss = make_loss(start.model, terms, examples[0].names)
    runs = compared_with(training).type in RUNNING
    state = TrainState(
        jnp.int32(0),
        flatten(params),
        {},
        None,
        flatten(start.params) if runs else {},
        loss.state,
    )
    micro = micro_batch_size(training, mesh)
    with jax.set_mesh(mesh):
        forward = make_forward(loss, jnp.dtype(training.compute_dtype))
        batches = held_out_batches(
            chosen,
            start.processor,
            lengths,
            micro,
            packed_over(start.model, mesh),
            batch_share(mesh),
        )
        values = measure_batches(forward, jax.jit(loss.sums), loss, batches, state, mesh)
    return len(chosen), values
