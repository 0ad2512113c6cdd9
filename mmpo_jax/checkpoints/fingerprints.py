"""What a checkpoint folder is known by: the files that a model is made of, and no others."""

from __future__ import annotations

import os

from etils import epath

from mmpo_jax.checkpoints.folders import ADAPTER_CONFIG, ADAPTER_WEIGHTS, PROCESSOR_FILES
from mmpo_jax.checkpoints.safetensors_files import weight_files
from mmpo_jax.core.errors import MmpoError
from mmpo_jax.core.files import fingerprint_files, walk

SIDE_FILES = ("config.json", *PROCESSOR_FILES)


def fingerprint_model(folder: str | os.PathLike[str]) -> str:
    """SHA-256 over a Hugging Face folder's config, tokenizer, processor and weights.

    Whatever else lies there, such as a model card or a trainer's optimizer, is not read. A folder
    and its copy elsewhere have the same.

    Raises:
      ModelError: there are no weights.
      DataError: a file cannot be read.
    """
    return fingerprint_files(model_files(folder))


def model_files(folder: str | os.PathLike[str]) -> dict[str, str]:
    """Name -> path of the files that `fingerprint_model` is of.

    Raises:
      ModelError: there are no weights.
    """
    weights = {os.path.basename(file): file for file in weight_files(folder)}
    return {**_present(folder, SIDE_FILES), **weights}


def fingerprint_adapter(folder: str | os.PathLike[str]) -> str:
    """SHA-256 over an adapter's config and weights.

    Raises:
      DataError: a file cannot be read.
    """
    return fingerprint_files(adapter_files(folder))


def adapter_files(folder: str | os.PathLike[str]) -> dict[str, str]:
    """Name -> path of the files that `fingerprint_adapter` is of."""
    return _present(folder, (ADAPTER_CONFIG, ADAPTER_WEIGHTS))


def fingerprint_step(step: str, base: str) -> str:
    """SHA-256 over the parameters in a step of a run, and the config, tokenizer and processor in
    its base folder. The state of the optimizer does not count.

    Raises:
      DataError: a file cannot be read.
    """
    return fingerprint_files(step_files(step, base))


def step_files(step: str, base: str) -> dict[str, str]:
    """Name -> path of the files that `fingerprint_step` is of."""
    params = os.path.join(step, "params")
    found = {
        os.path.join("params", place, name): os.path.join(params, place, name)
        for place, _, names in walk(params)
        for name in names
    }
    return {**_present(base, SIDE_FILES), **found}


def has_fingerprint(folder: str | os.PathLike[str], fingerprint: str) -> bool:
    """Whether a Hugging Face folder is there, is whole, and has this fingerprint."""
    try:
        return fingerprint_model(folder) == fingerprint
    except MmpoError:
        return False


def _present(folder: str | os.PathLike[str], names: tuple[str, ...]) -> dict[str, str]:
    """Name -> path of those files that a folder has."""
    paths = {name: epath.Path(folder) / name for name in names}
    return {name: os.fspath(path) for name, path in paths.items() if path.exists()}
