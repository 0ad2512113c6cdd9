"""A checkpoint ready to run: model, processor, and parameters on the mesh."""

from __future__ import annotations

import dataclasses
import os

from jax.sharding import Mesh

from mmpo_jax.data.processor import Processor
from mmpo_jax.files import fingerprint_folder
from mmpo_jax.models.config import load_config
from mmpo_jax.models.folders import resolve_folder
from mmpo_jax.models.huggingface import check_params, load_model
from mmpo_jax.models.llava import Model, Params
from mmpo_jax.parallel.mesh import put_params
from mmpo_jax.training.checkpoints import find_checkpoint, load_checkpoint_params


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What generation, labelling, reference and evaluation run on."""

    folder: str
    model: Model
    processor: Processor
    params: Params
    fingerprint: str


def load_checkpoint(name: str, mesh: Mesh) -> Checkpoint:
    """Loads a Hugging Face folder, an Orbax checkpoint of a training run, or a built-in model.

    Args:
      name: as a recipe's `model` has it. Of a training run's folder the last checkpoint is taken.
      mesh: where the parameters go.

    Raises:
      ModelError, ProcessorError, CheckpointError: naming the file that is missing or wrong.
    """
    folder = resolve_folder(name)
    is_folder = os.path.isfile(os.path.join(folder, "config.json"))
    orbax = None if is_folder else find_checkpoint(folder)
    if orbax is None:
        model, params = load_model(folder)
        processor = Processor(folder, model.config)
    else:
        folder, base = orbax
        model = Model.create(load_config(base))
        processor = Processor(base, model.config)
        params = check_params(folder, load_checkpoint_params(folder), model)
    placed = put_params(params, model.rules, mesh)
    return Checkpoint(folder, model, processor, placed, fingerprint_folder(folder))
