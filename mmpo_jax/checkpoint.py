"""Checkpoints by the names that recipes give them: Hugging Face folder, Orbax run, built-in."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import jax
from jax.sharding import Mesh

from mmpo_jax.data.processor import Processor
from mmpo_jax.files import fingerprint_folder, fingerprint_json, is_local
from mmpo_jax.models.folders import resolve_folder, side_files
from mmpo_jax.models.huggingface import check_params, flatten, load_params, unflatten
from mmpo_jax.models.model import Model, Params, load_config
from mmpo_jax.parallel.mesh import param_shardings, put_params
from mmpo_jax.training.checkpoints import (
    checkpoint_shapes,
    find_checkpoint,
    load_checkpoint_params,
)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A model with its processor and parameters."""

    folder: str
    model: Model
    processor: Processor
    params: Params
    fingerprint: str
    """Of the weights and all files beside them; of seed and config where they are random."""


@dataclasses.dataclass(frozen=True)
class Location:
    """Where the files of a checkpoint lie."""

    weights: str
    """A folder of safetensors files, maybe in a bucket, or one step of a run."""
    base: str
    """A folder of this machine with config, tokenizer and processor."""
    is_orbax: bool


def locate(name: str) -> Location:
    """Finds a checkpoint by its name in a recipe; of a training run the last step.

    Raises:
      ModelError: there is none.
    """
    folder = resolve_folder(name)
    if not is_local(folder) or os.path.isfile(os.path.join(folder, "config.json")):
        return Location(folder, side_files(folder), False)
    orbax = find_checkpoint(folder)
    return Location(folder, folder, False) if orbax is None else Location(*orbax, True)


def load_weights(
    location: Location, model: Model, mesh: Mesh | None = None, dtype: Any = None
) -> Params:
    """The parameters of a checkpoint, straight onto the mesh or as NumPy arrays on the host.

    Args:
      location: of the files.
      model: the architecture.
      mesh: its devices get the parameters, sharded by the model's rules; None for the host.
      dtype: to cast to; None for that of the files.

    Raises:
      ModelError, CheckpointError: naming the file that is missing or wrong.
    """
    abstract = model.abstract_params()
    shardings = None if mesh is None else param_shardings(abstract, model.rules, mesh)
    if not location.is_orbax:
        return load_params(location.weights, model, shardings, dtype)
    saved = checkpoint_shapes(location.weights)
    check_params(location.weights, unflatten(saved), model)
    places = {} if shardings is None else flatten(shardings)
    wanted = {
        path: jax.ShapeDtypeStruct(leaf.shape, dtype or leaf.dtype, sharding=places.get(path))
        for path, leaf in saved.items()
    }
    return load_checkpoint_params(location.weights, wanted)


def load_processor(name: str) -> Processor:
    """The processor of a checkpoint.

    Raises:
      ModelError, ProcessorError: naming the file that is missing or wrong.
    """
    base = locate(name).base
    return Processor(base, load_config(base))


def load_start(name: str, random_seed: int | None = None, mesh: Mesh | None = None) -> Checkpoint:
    """Loads a Hugging Face folder, an Orbax checkpoint of a training run, or a built-in model.

    Args:
      name: as a recipe's `model` has it. Of a training run's folder the last checkpoint is taken.
      random_seed: makes new weights for the config and the processor of the folder.
      mesh: see `load_weights`.

    Raises:
      ModelError, ProcessorError, CheckpointError: naming the file that is missing or wrong.
    """
    location = locate(name)
    folder = location.weights
    model = Model.create(load_config(location.base))
    processor = Processor(location.base, model.config)
    if random_seed is None:
        params = load_weights(location, model, mesh)
        return Checkpoint(folder, model, processor, params, fingerprint_folder(folder))
    # The weights that lie in the folder do not matter.
    fingerprint = fingerprint_json(["random", random_seed, dataclasses.asdict(model.config)])
    params = model.init(random_seed)
    if mesh is not None:
        params = put_params(params, model.rules, mesh)
    return Checkpoint(folder, model, processor, params, fingerprint)


def load_checkpoint(name: str, mesh: Mesh) -> Checkpoint:
    """`load_start` with the parameters on the mesh."""
    return load_start(name, mesh=mesh)
