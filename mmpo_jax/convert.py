"""`mmpo convert`: a training run's checkpoint to a Hugging Face folder, and the way back."""

from __future__ import annotations

import os

from mmpo_jax.checkpoint import Location, load_model_config, load_weights, locate
from mmpo_jax.errors import MmpoError
from mmpo_jax.files import is_local, replace_folder
from mmpo_jax.models.card import ModelCard, read_card
from mmpo_jax.models.huggingface import save_model
from mmpo_jax.models.model import Model
from mmpo_jax.parallel.mesh import make_mesh
from mmpo_jax.training.checkpoints import save_base, save_start
from mmpo_jax.training.metrics import FILE, read_metrics


def convert(source: str, target: str, dtype: str | None = None) -> str:
    """Writes a checkpoint anew in the other format.

    Args:
      source: a run, one step of it, or whatever else a recipe's `model` may name.
      target: a folder that is not there yet. Of a run it becomes a Hugging Face folder, of
        everything else a folder that recipes can start from as from a run's.
      dtype: to cast the weights to; None keeps theirs.

    Returns:
      What was written, for people.

    Raises:
      MmpoError: there is something at the target, or the source cannot be read.
    """
    if not is_local(target):
        raise MmpoError(f"{target}: is in a bucket; convert writes folders of this machine")
    if os.path.exists(target):
        raise MmpoError(f"{target}: is there already; convert writes new folders only")
    location = locate(source)
    model = Model.create(load_model_config(location))
    params = load_weights(location, model, make_mesh(), dtype)
    if location.is_orbax:
        save_model(target, model, params, location.base, card=_card(location))
        return f"Hugging Face folder: {target}"

    def write(staging: str) -> None:
        save_base(staging, location.base)
        save_start(staging, params)

    replace_folder(target, write)
    return f"Orbax checkpoint: {target}"


def _card(location: Location) -> ModelCard | None:
    """Of a run, with what it measured last before the step."""
    step = int(os.path.basename(location.weights))
    rows = read_metrics(os.path.join(os.path.dirname(location.base), FILE))
    measured = [row for row in rows if row["step"] <= step]
    return read_card(location.base, measured[-1] if measured else {})
