"""Checkpoints by the names that recipes give them: Hugging Face folder, Orbax run, built-in."""

from __future__ import annotations

import dataclasses
import os

from jax.sharding import Mesh

from mmpo_jax.data.processor import Processor
from mmpo_jax.files import fingerprint_folder, fingerprint_json
from mmpo_jax.models.folders import resolve_folder
from mmpo_jax.models.huggingface import check_params, load_params
from mmpo_jax.models.model import Model, Params, load_config
from mmpo_jax.parallel.mesh import put_params
from mmpo_jax.training.checkpoints import find_checkpoint, load_checkpoint_params


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A model with its processor and parameters."""

    folder: str
    model: Model
    processor: Processor
    params: Params
    fingerprint: str
    """Of the weights and all files beside them; of seed and config where they are random."""


def load_start(name: str, random_seed: int | None = None, *, attention: str = "auto") -> Checkpoint:
    """Loads a Hugging Face folder, an Orbax checkpoint of a training run, or a built-in model.

    Args:
      name: as a recipe's `model` has it. Of a training run's folder the last checkpoint is taken.
      random_seed: makes new weights for the config and the processor of the folder.
      attention: of the model, see `attention.BACKENDS`.

    Returns:
      The checkpoint with its parameters on the host.

    Raises:
      ModelError, ProcessorError, CheckpointError: naming the file that is missing or wrong.
    """
    folder = resolve_folder(name)
    is_folder = os.path.isfile(os.path.join(folder, "config.json"))
    orbax = None if is_folder else find_checkpoint(folder)
    base = folder
    if orbax is not None:
        folder, base = orbax
    model = Model.create(load_config(base), attention)
    processor = Processor(base, model.config)
    if random_seed is not None:
        # The weights that lie in the folder do not matter.
        fingerprint = fingerprint_json(["random", random_seed, dataclasses.asdict(model.config)])
        return Checkpoint(folder, model, processor, model.init(random_seed), fingerprint)
    if orbax is None:
        params = load_params(folder, model)
    else:
        params = check_params(folder, load_checkpoint_params(folder), model)
    return Checkpoint(folder, model, processor, params, fingerprint_folder(folder))


def load_checkpoint(name: str, mesh: Mesh, attention: str = "auto") -> Checkpoint:
    """`load_start` with the parameters on the mesh, sharded by the model's rules."""
    start = load_start(name, attention=attention)
    placed = put_params(start.params, start.model.rules, mesh)
    return dataclasses.replace(start, params=placed)
