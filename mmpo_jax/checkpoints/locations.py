"""Where the files of a checkpoint lie, by the names that recipes give, and their digest."""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
from typing import Any

from mmpo_jax.checkpoints.below import Below, read_below
from mmpo_jax.checkpoints.fingerprints import (
    adapter_files,
    fingerprint_adapter,
    fingerprint_model,
    fingerprint_step,
    model_files,
    step_files,
)
from mmpo_jax.checkpoints.folders import is_on_hub, resolve_folder, side_files
from mmpo_jax.checkpoints.orbax import find_checkpoint
from mmpo_jax.checkpoints.peft import base_model, has_model, is_adapter_folder
from mmpo_jax.checkpoints.steps import checkpoint_shapes
from mmpo_jax.core import progress
from mmpo_jax.core.buckets import is_file
from mmpo_jax.core.files import fingerprint_json
from mmpo_jax.core.known_files import state_of
from mmpo_jax.core.processes import alone, check_same, is_first, on_one, wait_for
from mmpo_jax.core.trees import unflatten
from mmpo_jax.models.config import ModelError
from mmpo_jax.models.lora import adapted_layers

log = logging.getLogger(__name__)

MERGED = "merged in float32"
"""Part of the fingerprint of what adapters are merged into: once sums had the dtype of the base."""
RESULT = "model"
"""Folder of the result in the output of a run, which may be named in its place where it has no
steps of its own, as an alignment's."""


@dataclasses.dataclass(frozen=True)
class Location:
    """Where the files of a checkpoint lie."""

    weights: str
    """A folder of safetensors files, or one step of a run, maybe in a bucket."""
    base: str
    """A folder of this machine with config, tokenizer and processor."""
    is_orbax: bool
    adapters: tuple[str, ...] = ()
    """Folders of what is merged into the weights, in this order."""
    below: tuple[Below, Location] | None = None
    """Of a step that has adapters alone, what they are of and where it lies."""


def locate(name: str) -> Location:
    """Finds a checkpoint by its name in a recipe; of a training run the last step.

    Of several processes the first says what there is, and the others wait until they see it too:
    file systems of networks show what another host wrote some seconds later.

    Raises:
      ModelError: there is none, or an adapter's base is not there; or another process does not see
        what the first does.
    """
    of_hub, first = on_one(lambda: (is_on_hub(name), _locate(name)))
    if is_first():
        return first
    what = (first.weights, *first.adapters)[-1]
    with alone(), progress.doing(f"waiting until {what} is to be seen here"):
        look = functools.partial(_found_here, name, first, of_hub)
        return wait_for(look, f"{name}: {what}")


def _found_here(name: str, first: Location, of_hub: bool) -> Location | None:
    """A location in folders of this host, which has its own of what is the hub's or built in; None
    where it is not, or not yet, what the first process sees."""
    if is_on_hub(name) and not of_hub:  # a relative path may be spelled as an id
        return None
    try:
        own = _locate(name)
    except ModelError:
        if of_hub:
            raise
        return None
    return own if _is_alike(own, first) else None


def _is_alike(own: Location, first: Location) -> bool:
    """Whether two processes see the same kind of checkpoint, of a run the same step of it."""
    step = os.path.basename(own.weights) == os.path.basename(first.weights)
    return (
        own.is_orbax == first.is_orbax
        and len(own.adapters) == len(first.adapters)
        and (step or not own.is_orbax)
    )


def _locate(name: str) -> Location:
    """`locate` in this process."""
    folder, *adapters = checkpoint_folders(name)
    has_config = is_file(os.path.join(folder, "config.json"))
    orbax = None if has_config else find_checkpoint(folder)
    if orbax is None:
        model = os.path.join(folder, RESULT)
        if not has_config and not adapters and is_file(os.path.join(model, "config.json")):
            log.info("%s: its model is %s", name, model)
            folder = model
        return Location(folder, side_files(folder), False, tuple(adapters))
    step, base = orbax
    known = read_below(base)
    below = None if known is None else (known, _locate(known.model))
    return Location(step, side_files(base), True, tuple(adapters), below)


def checkpoint_folders(name: str) -> list[str]:
    """The folders a checkpoint is made of: the model's, then those of adapters, in the order in
    which they are merged.

    As in transformers with PEFT, a folder with a `config.json` and an adapter is the model in that
    folder with that adapter, also where its weights are missing or cannot be read; of a
    repository of the hub the model is the one that the adapter names.

    Raises:
      ModelError: one of them is not there, or an adapter is its own base.
    """
    folders = [resolve_folder(name)]
    while is_adapter_folder(folders[0]):
        if not is_on_hub(name) and has_model(folders[0]):
            return [folders[0], *folders]
        try:
            name = base_model(folders[0])
            folder = resolve_folder(name)
        except ModelError as error:
            raise ModelError(f"{folders[0]}: the model of this adapter: {error}") from error
        if folder in folders:
            raise ModelError(f"{folder}: this adapter is named as its own base model")
        folders.insert(0, folder)
    return folders


def fingerprint_location(location: Location) -> str:
    """Digest of all files that make up a checkpoint.

    Of several processes the first reads them. The others do where they see copies of them, and not
    the same files by their size, time and inode.

    Raises:
      ModelError, DataError: naming the file that is missing or cannot be read.
      MmpoError: another process has other files.
    """
    check_same_files(location)
    return on_one(lambda: _fingerprint(location))


def check_same_files(location: Location) -> None:
    """Checks that all processes have the same files of a checkpoint; see `fingerprint_location`.

    Raises:
      MmpoError: in all processes, naming one that differs from the first.
    """
    cheap, whole = (functools.partial(each, location) for each in (_states, _fingerprint))
    check_same(f"{location.weights}: the files", cheap, whole)


def _states(location: Location) -> str:
    """Digest of how the files are, which tells copies apart from files on one file system."""
    if location.is_orbax:
        files = step_files(location.weights, location.base)
    else:
        files = model_files(location.weights)
    found = [files, *map(adapter_files, location.adapters)]
    states: list[Any] = [{name: state_of(path) for name, path in each.items()} for each in found]
    if location.below is not None:
        states.append(_states(location.below[1]))
    return fingerprint_json(states)


def _fingerprint(location: Location) -> str:
    with progress.doing(f"checksum of {location.weights}"):
        if location.is_orbax:
            model = fingerprint_step(location.weights, location.base)
        else:
            model = fingerprint_model(location.weights)
        adapters = [fingerprint_adapter(folder) for folder in location.adapters]
    if location.below is not None:
        known, base = location.below
        adapters += [known.quantization, _fingerprint(base)]
    if not adapters and not (location.is_orbax and _has_adapters(location.weights)):
        return model
    return fingerprint_json([model, *adapters, MERGED])


def _has_adapters(step: str) -> bool:
    return bool(adapted_layers(unflatten(checkpoint_shapes(step))))
