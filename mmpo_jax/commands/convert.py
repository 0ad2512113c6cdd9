"""`mmpo convert`: a run's checkpoint, or an adapter merged into its base, to a Hugging Face folder,
and the way back."""

from __future__ import annotations

import argparse
import dataclasses
import os
import shutil

import numpy as np

from mmpo_jax.checkpoints.cards import ModelCard, SavedWeights, read_card, write_card
from mmpo_jax.checkpoints.folders import BASE
from mmpo_jax.checkpoints.huggingface import save_model
from mmpo_jax.checkpoints.locations import Location, check_same_files, locate
from mmpo_jax.checkpoints.orbax import save_base, save_start
from mmpo_jax.checkpoints.rounding import stored_dtype
from mmpo_jax.checkpoints.weights import load_model_config, load_weights, quantized_base
from mmpo_jax.core import progress
from mmpo_jax.core.buckets import incomplete, put_in_place
from mmpo_jax.core.errors import MmpoError
from mmpo_jax.core.output import is_new
from mmpo_jax.core.processes import is_first, on_one
from mmpo_jax.models.model import Model, Params
from mmpo_jax.models.precision import weights_dtype
from mmpo_jax.parallel.mesh import make_mesh
from mmpo_jax.training.metrics import FILE, read_metrics, reproducible
from mmpo_jax.training.saving import Before, load_before, tell_saved


def main(options: argparse.Namespace) -> None:
    print(convert(options.source, options.target, options.dtype))


def convert(source: str, target: str, dtype: str | None = None) -> str:
    """Writes a checkpoint anew in the other format.

    Args:
      source: a run, one step of it, or whatever else a recipe's `model` may name.
      target: a folder that is not there yet, or a claim of it. Of a run, and of an adapter, which
        is merged into its base, it becomes a Hugging Face folder; of everything else a folder that
        recipes can start from as from a run's.
      dtype: a `SaveDtype` that the weights are rounded to; None keeps theirs, of a run the widest,
        which is float32 wherever matrices were trained, as it is of a merged adapter.

    Returns:
      What was written, for people.

    Raises:
      MmpoError: there is something at the target, or the source cannot be read.
    """
    if on_one(lambda: not is_new(target)):
        raise MmpoError(f"{target}: is there already; give a new folder")
    location = locate(source)
    check_same_files(location)
    model = Model.create(load_model_config(location))
    if location.is_orbax or location.adapters:
        with progress.doing(f"loading {location.weights}"):
            params = load_weights(location, model, make_mesh())
        if dtype is None and weights_dtype(params) == np.float32:  # else tensors keep theirs
            dtype = "float32"
        _save_model(target, model, params, location, dtype, source)
        return f"Hugging Face folder: {target}"
    if dtype is not None and dtype != stored_dtype(dtype).name:
        raise MmpoError(f"--dtype {dtype}: weights are rounded at random in Hugging Face folders")
    with progress.doing(f"loading {location.weights}"):
        params = load_weights(location, model, make_mesh(), dtype)

    _write_start(target, location, params)
    return f"Orbax checkpoint: {target}"


def _write_start(target: str, location: Location, params: Params) -> None:
    """Writes parameters as a run nobody trained, which appears whole; all processes write their
    part of them."""
    staging = incomplete(target)
    on_one(lambda: shutil.rmtree(staging, ignore_errors=True))
    try:
        save_base(staging, location.base)
        save_start(staging, params)
    except BaseException:
        if is_first():
            shutil.rmtree(staging, ignore_errors=True)
        raise
    on_one(lambda: put_in_place(staging, target))


def _save_model(
    target: str, model: Model, params: Params, location: Location, dtype: str | None, source: str
) -> None:
    """Writes the weights of a run or of merged adapters, and says in log and card what their dtype
    keeps of the update."""
    card = None if location.adapters else _card(location)
    before = Before(None)
    if dtype not in (None, "float32"):
        before = _before(location, card, model)
    with progress.doing(f"saving {target}"):
        share = save_model(
            *(target, model, params, location.base),
            dtype=dtype,
            before=before.params,
            card=card,
            quantized_base=quantized_base(location),
        )
    if dtype is None:
        return
    saved = SavedWeights(dtype, share, unknown=before.unknown)
    tell_saved(target, saved, source)
    if card is not None:
        write_card(target, dataclasses.replace(card, saved=saved))


def _before(location: Location, card: ModelCard | None, model: Model) -> Before:
    """What an update is counted from: the base of adapters, or what the card of a run names."""
    if location.adapters:
        base = dataclasses.replace(location, adapters=())
        below = Model.create(load_model_config(base))
        return Before(load_weights(base, below, make_mesh()))
    return Before(None) if card is None else load_before(card, model, make_mesh())


def _card(location: Location) -> ModelCard | None:
    """A run's card, with what it measured last before the step."""
    step = int(os.path.basename(location.weights))
    run = os.path.dirname(os.path.dirname(location.weights))

    def read() -> ModelCard | None:
        rows = read_metrics(os.path.join(run, FILE))
        measured = [row for row in rows if row["step"] <= step]
        return read_card(os.path.join(run, BASE), reproducible(measured[-1]) if measured else {})

    return on_one(read)
