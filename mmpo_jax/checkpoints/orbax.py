"""Checkpoints that Orbax wrote, as models: where they are, their parameters, what lies beside."""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Mapping

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from mmpo_jax.checkpoints.best_steps import BEST, best_of
from mmpo_jax.checkpoints.cards import ModelCard, save_card
from mmpo_jax.checkpoints.digests import digests
from mmpo_jax.checkpoints.folders import (
    BASE,
    copy_base,
    write_quantized_base,
    write_reward_head,
)
from mmpo_jax.checkpoints.steps import (
    CHECKPOINTS,
    PARAMS,
    check_item,
    checkpoint_shapes,
    is_number,
    read_item,
    read_run,
    sealed,
)
from mmpo_jax.core import progress
from mmpo_jax.core.buckets import absolute, entries, is_folder
from mmpo_jax.core.errors import MmpoError
from mmpo_jax.core.files import check_reachable, is_local
from mmpo_jax.core.processes import on_one
from mmpo_jax.core.trees import flatten, unflatten
from mmpo_jax.models.model import Model, Params
from mmpo_jax.models.quantized import Quantization

ORBAX_BUCKETS = "gs://"
"""Scheme of the buckets that Orbax writes to."""


def check_holds_checkpoints(output: str) -> None:
    """
    Raises:
      MmpoError: an output in a bucket cannot be reached, or Orbax cannot write there.
    """
    check_reachable(output)
    if is_local(output):
        return
    if not output.startswith(ORBAX_BUCKETS):
        raise MmpoError(
            f"output: {output}: checkpoints are written to folders of this machine and to "
            f"{ORBAX_BUCKETS} alone"
        )
    try:
        importlib.import_module("google.cloud.storage")
    except ImportError as error:
        raise MmpoError(
            f"output: {output}: checkpoints in buckets need the package google-cloud-storage, "
            "which is not installed (the extra `tpu` has it)"
        ) from error


def save_base(
    folder: str | os.PathLike[str],
    source: str | os.PathLike[str],
    chat_template: str | None = None,
    card: ModelCard | None = None,
    model: Model | None = None,
    quantized_base: Quantization | None = None,
) -> str:
    """Copies what a checkpoint needs to be run beside it: config, tokenizer, processor.

    Args:
      folder: of the run.
      source: a checkpoint folder.
      chat_template: in place of the source's.
      card: of what will be converted from the run.
      model: whose reward head the config is to say, where the source's does not.
      quantized_base: what the config is to say of it, see `weights.quantized_base`.

    Returns:
      The folder.
    """
    base = os.path.join(folder, BASE)

    def save() -> None:
        copy_base(source, base, chat_template)
        if model is not None:
            write_reward_head(base, model)
        write_quantized_base(base, quantized_base)
        if card is not None:
            save_card(base, card)

    on_one(save)
    return base


def find_checkpoint(path: str | os.PathLike[str]) -> tuple[str, str] | None:
    """(step folder, base folder) where `path` is a run, its `checkpoints/` or one step of it.

    Of a run that held rows out, the best step, else the last one.
    """
    path = absolute(path)
    for folder in (os.path.join(path, BEST), os.path.join(path, CHECKPOINTS), path):
        names = entries(folder)
        steps = [int(name) for name in names if is_number(name) and _is_step(folder, name)]
        if steps and is_folder(os.path.join(os.path.dirname(folder), BASE)):
            is_best = os.path.basename(folder) == BEST
            step = best_of(folder, steps) if is_best else max(steps)
            return os.path.join(folder, str(step)), os.path.join(os.path.dirname(folder), BASE)
    base = os.path.join(os.path.dirname(os.path.dirname(path)), BASE)
    if is_number(os.path.basename(path)) and is_folder(base):
        return path, base
    return None


def _is_step(folder: str, name: str) -> bool:
    """Whether a step is whole: in a bucket a file that is written last says so."""
    step = epath.Path(folder) / name
    return is_folder(step / PARAMS) and ocp.utils.is_checkpoint_finalized(step)


def save_start(folder: str | os.PathLike[str], params: Params) -> None:
    """Writes parameters as the step 0 of a run that nobody trained.

    Recipes can start from it, but no training goes on with it: it has no optimizer.
    """
    target = os.path.abspath(os.path.join(folder, CHECKPOINTS))
    manager, flat = ocp.CheckpointManager(target), flatten(params)
    total = sum(leaf.nbytes for leaf in flat.values())
    told = progress.doing(
        "writing the checkpoint", max(1, round(total / 1e6)), "MB", measure=lambda: written(target)
    )
    with told, contextlib.closing(manager):
        run = {"identity": {"converted": True}, "position": {}}
        run = sealed({**run, "digests": {PARAMS: digests(flat)}})
        saved = ocp.args.Composite(params=ocp.args.StandardSave(flat), run=ocp.args.JsonSave(run))
        manager.save(0, args=saved)
        manager.wait_until_finished()


def written(folder: str) -> int:
    """MB of a checkpoint that is being written, which Orbax compresses a little."""
    files = (os.path.join(root, name) for root, _, names in os.walk(folder) for name in names)
    size = 0
    for file in files:
        with contextlib.suppress(OSError):  # renamed meanwhile
            size += os.path.getsize(file)
    return round(size / 1e6)


def load_checkpoint_params(
    step_folder: str, wanted: Mapping[str, jax.ShapeDtypeStruct] | None = None
) -> Params:
    """The parameters of one checkpoint, compared with what was saved where they are not cast.

    Args:
      step_folder: of the checkpoint.
      wanted: shapes, dtypes to cast to and shardings, by path; without a sharding a parameter
        becomes a NumPy array. None for NumPy arrays in the dtypes that were saved.

    Raises:
      CheckpointError: the folder is not a whole checkpoint.
    """
    saved = checkpoint_shapes(step_folder)
    wanted = saved if wanted is None else wanted
    targets = {
        # Asked for NumPy arrays, Orbax does not look for the devices they were saved from.
        name: np.empty(leaf.shape, leaf.dtype) if leaf.sharding is None else leaf
        for name, leaf in wanted.items()
    }
    params = read_item(step_folder, PARAMS, targets)
    known = read_run(step_folder).get("digests", {}).get(PARAMS, {})
    uncast = {
        path: leaf
        for path, leaf in params.items()
        if path in saved and leaf.dtype == saved[path].dtype
    }
    check_item(step_folder, PARAMS, uncast, {path: known[path] for path in uncast if path in known})
    return unflatten(params)
