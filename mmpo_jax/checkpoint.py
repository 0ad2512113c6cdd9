"""Checkpoints by the names that recipes give them: Hugging Face folder, Orbax run, adapter, or
built-in."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence

from jax.sharding import Mesh

from mmpo_jax.data.processor import Processor
from mmpo_jax.files import fingerprint_folder, fingerprint_json
from mmpo_jax.models.config import ModelError
from mmpo_jax.models.folders import resolve_folder
from mmpo_jax.models.huggingface import check_params, load_params
from mmpo_jax.models.lora import merge_adapters
from mmpo_jax.models.model import Model, Params, load_config
from mmpo_jax.models.peft import base_model, is_adapter_folder, with_adapter
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


def load_start(name: str, random_seed: int | None = None) -> Checkpoint:
    """Loads a Hugging Face folder, an Orbax checkpoint, an adapter's folder, or a built-in model.

    Args:
      name: as a recipe's `model` has it. Of a training run's folder the last checkpoint is taken;
        an adapter is merged into the model that it names, which may have one itself.
      random_seed: makes new weights for the config and the processor of the folder.

    Returns:
      The checkpoint with its parameters on the host.

    Raises:
      ModelError, ProcessorError, CheckpointError: naming the file that is missing or wrong.
    """
    *adapters, folder = checkpoint_folders(name)
    is_folder = os.path.isfile(os.path.join(folder, "config.json"))
    orbax = None if is_folder else find_checkpoint(folder)
    base = folder
    if orbax is not None:
        folder, base = orbax
    model = Model.create(load_config(base))
    processor = Processor(base, model.config)
    if random_seed is not None:
        # The weights that lie in the folder do not matter.
        fingerprint = fingerprint_json(["random", random_seed, dataclasses.asdict(model.config)])
        return Checkpoint(folder, model, processor, model.init(random_seed), fingerprint)
    if orbax is None:
        params = load_params(folder, model)
    else:
        saved = load_checkpoint_params(folder)
        params = check_params(folder, merge_adapters(saved), model)
    parts = [folder, *reversed(adapters)]
    for adapter in parts[1:]:
        params = merge_adapters(with_adapter(params, adapter, model))
    return Checkpoint(parts[-1], model, processor, params, fingerprint_parts(parts))


def fingerprint_parts(folders: Sequence[str]) -> str:
    """Of a model's folder and those of its adapters, in the order in which they are merged."""
    first, *adapters = (fingerprint_folder(folder) for folder in folders)
    return fingerprint_json([first, *adapters]) if adapters else first


def checkpoint_folders(name: str) -> list[str]:
    """The folders a checkpoint is made of: that of the model last, before it those of adapters.

    Raises:
      ModelError: one of them is not there, or an adapter is its own base.
    """
    folders = [resolve_folder(name)]
    while is_adapter_folder(folders[-1]):
        try:
            folder = resolve_folder(base_model(folders[-1]))
        except ModelError as error:
            raise ModelError(f"{folders[-1]}: the model of this adapter: {error}") from error
        if folder in folders:
            raise ModelError(f"{folder}: this adapter is named as its own base model")
        folders.append(folder)
    return folders


def load_checkpoint(name: str, mesh: Mesh) -> Checkpoint:
    """`load_start` with the parameters on the mesh, sharded by the model's rules."""
    start = load_start(name)
    placed = put_params(start.params, start.model.rules, mesh)
    return dataclasses.replace(start, params=placed)
