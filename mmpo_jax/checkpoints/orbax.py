"""Orbax checkpoints of training: state, data position, and the base folder they belong to."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import importlib
import json
import logging
import os
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from mmpo_jax.checkpoints.cards import ModelCard, save_card
from mmpo_jax.checkpoints.folders import BASE, copy_base, write_reward_head
from mmpo_jax.checkpoints.train_state import TrainState
from mmpo_jax.core import progress
from mmpo_jax.core.buckets import absolute, entries, is_folder, remove_tree
from mmpo_jax.core.errors import MmpoError
from mmpo_jax.core.files import check_reachable, is_local
from mmpo_jax.core.processes import on_one
from mmpo_jax.core.trees import flatten, unflatten
from mmpo_jax.models.model import Model, Params
from mmpo_jax.parallel.mesh import put_whole

log = logging.getLogger(__name__)

BEST = "best"
"""Folder beside `checkpoints/`: the parameters of the step where held-out rows were best."""


ORBAX_BUCKETS = "gs://"
"""Scheme of the buckets that Orbax writes to."""


class CheckpointError(MmpoError):
    """A checkpoint that does not belong to this run or cannot be read."""


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


class Checkpoints:
    """Saves a run's state as it goes and finds the last one again."""

    def __init__(self, folder: str | os.PathLike[str], identity: Mapping[str, Any], keep: int):
        """
        Args:
          folder: of the run; checkpoints go to `checkpoints/`.
          identity: everything the run is made of, as JSON: options, and fingerprints of what is
            large. Checkpoints of another run are refused.
          keep: how many to keep.
        """
        self.identity = identity
        self.folder = absolute(os.path.join(folder, "checkpoints"))
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
        self.manager = ocp.CheckpointManager(self.folder, options=options)
        self._best_folder = os.path.join(os.path.dirname(self.folder), BEST)

    def latest(self) -> int | None:
        """The last saved step."""
        return on_one(self.manager.latest_step)

    def describe_latest(self) -> str:
        """The last good checkpoint's folder, for messages."""
        with self._writing():
            self.manager.wait_until_finished()
        return _newest(self.folder)

    def save(self, step: int, state: TrainState, position: dict[str, Any]) -> None:
        """Writes a checkpoint in the background.

        Args:
          step: updates done.
          state: all of it, copied before this returns.
          position: the data iterator's state.

        Raises:
          CheckpointError: this one, or the one before, cannot be written.
        """
        run = {"identity": self.identity, "position": position}
        args = ocp.args.Composite(
            params=ocp.args.StandardSave({**state.params, **state.frozen}),
            optimizer=ocp.args.StandardSave(state.optimizer),
            run=ocp.args.JsonSave(run),
            **{name: ocp.args.StandardSave(tree) for name, tree in _others(state).items()},
        )
        with self._writing():
            self.manager.save(step, args=args)

    def restore(self, state: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """The last checkpoint in the given state's shapes and shardings, and the data position.

        Args:
          state: arrays, or what `abstract` leaves of them.

        Raises:
          CheckpointError: it is of another run, or nothing was saved.
        """
        step = self.latest()
        if step is None:
            raise CheckpointError(f"{self.folder}: no checkpoint was saved here")
        saved = self.manager.restore(step, args=ocp.args.Composite(run=ocp.args.JsonRestore()))
        changed = list(_changes(saved["run"]["identity"], self.identity))
        if changed:
            more = f" and {len(changed) - 5} more" if len(changed) > 5 else ""
            raise CheckpointError(
                f"{self.folder}: these checkpoints are of a run with another model, data or "
                f"recipe: {', '.join(changed[:5])}{more}; give another output folder or remove them"
            )
        restored = self.manager.restore(
            step,
            args=ocp.args.Composite(
                params=_wanted({**state.params, **state.frozen}),
                optimizer=_wanted(state.optimizer),
                **{name: _wanted(tree) for name, tree in _others(state).items()},
            ),
        )
        params = restored["params"]
        log.info("continuing from step %d", step)
        number = put_whole(np.int32(step), state.step.sharding)
        resumed = TrainState(
            number,
            {path: params[path] for path in state.params},
            {path: params[path] for path in state.frozen},
            restored["optimizer"],
            **{name: restored[name] for name in _others(state)},
        )
        return resumed, saved["run"]["position"]

    def save_best(self, step: int, state: TrainState) -> None:
        """Writes the parameters as the best so far, in place of those before.

        Raises:
          CheckpointError: they cannot be written.
        """
        params = ocp.args.StandardSave({**state.params, **state.frozen})
        with self._writing():
            if self.best.latest_step() != step:  # of before a kill, then the same
                self.best.save(step, args=ocp.args.Composite(params=params), force=True)
                self.best.wait_until_finished()

    def discard_best(self) -> None:
        """Removes what was best in an attempt of which no checkpoint is left."""
        on_one(lambda: remove_tree(self._best_folder))

    def restore_best(self, state: TrainState) -> TrainState:
        """The state with the best parameters."""
        args = ocp.args.Composite(params=_wanted({**state.params, **state.frozen}))
        params = self.best.restore(self.best.latest_step(), args=args)["params"]
        return dataclasses.replace(
            state,
            params={path: params[path] for path in state.params},
            frozen={path: params[path] for path in state.frozen},
        )

    @functools.cached_property
    def best(self) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(max_to_keep=1, cleanup_tmp_directories=True)
        return ocp.CheckpointManager(self._best_folder, options=options)

    def close(self) -> None:
        """Waits until all is written.

        Raises:
          CheckpointError: the last one cannot be written.
        """
        with self._writing():
            self.manager.wait_until_finished()
            self.manager.close()
            if "best" in vars(self):
                self.best.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Orbax tells of a full disk in whichever call comes next, as one of several types."""
        try:
            yield
        except (OSError, ValueError) as error:
            full = os.strerror(errno.ENOSPC)
            reason = "the disk is full" if full in str(error) else str(error).splitlines()[-1]
            raise CheckpointError(
                f"{self.folder}: a checkpoint cannot be written: {reason}; "
                f"last good checkpoint: {_newest(self.folder)}; the same command goes on from there"
            ) from error


def _changes(before: Any, now: Any, name: str = "") -> Iterator[str]:
    """What differs between two JSON values, for messages: dotted names, short values with them."""
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        before, now = dict(enumerate(before)), dict(enumerate(now))
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for key in {**now, **before}:
            inner = f"{name}.{key}" if name else str(key)
            yield from _changes(before.get(key), now.get(key), inner)
    elif before != now:
        texts = [json.dumps(value) for value in (before, now)]
        short = max(map(len, texts)) < 40  # no fingerprints
        yield f"{name} ({texts[0]} there, {texts[1]} here)" if short else name


def save_base(
    folder: str | os.PathLike[str],
    source: str | os.PathLike[str],
    chat_template: str | None = None,
    card: ModelCard | None = None,
    model: Model | None = None,
) -> str:
    """Copies what a checkpoint needs to be run beside it: config, tokenizer, processor.

    Args:
      folder: of the run.
      source: a checkpoint folder.
      chat_template: in place of the source's.
      card: of what will be converted from the run.
      model: whose reward head the config is to say, where the source's does not.

    Returns:
      The folder.
    """
    base = os.path.join(folder, BASE)

    def save() -> None:
        copy_base(source, base, chat_template)
        if model is not None:
            write_reward_head(base, model)
        if card is not None:
            save_card(base, card)

    on_one(save)
    return base


def find_checkpoint(path: str | os.PathLike[str]) -> tuple[str, str] | None:
    """(step folder, base folder) where `path` is a run, its `checkpoints/` or one step of it.

    Of a run that held rows out, the best step, else the last one.
    """
    path = absolute(path)
    for folder in (os.path.join(path, BEST), os.path.join(path, "checkpoints"), path):
        steps = [name for name in entries(folder) if name.isdigit() and _is_step(folder, name)]
        if steps and is_folder(os.path.join(os.path.dirname(folder), BASE)):
            step = os.path.join(folder, max(steps, key=int))
            return step, os.path.join(os.path.dirname(folder), BASE)
    base = os.path.join(os.path.dirname(os.path.dirname(path)), BASE)
    if os.path.basename(path).isdigit() and is_folder(base):
        return path, base
    return None


def save_start(folder: str | os.PathLike[str], params: Params) -> None:
    """Writes parameters as the step 0 of a run that nobody trained.

    Recipes can start from it, but no training goes on with it: it has no optimizer.
    """
    target = os.path.abspath(os.path.join(folder, "checkpoints"))
    manager, flat = ocp.CheckpointManager(target), flatten(params)
    total = sum(leaf.nbytes for leaf in flat.values())
    told = progress.doing(
        "writing the checkpoint", max(1, round(total / 1e6)), "MB", measure=lambda: written(target)
    )
    with told, contextlib.closing(manager):
        run = {"identity": {"converted": True}, "position": {}}
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


def checkpoint_shapes(step_folder: str) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of the parameters in one checkpoint, by path.

    Raises:
      CheckpointError: the folder is not a whole checkpoint.
    """
    with _whole_checkpoint(step_folder) as (checkpointer, path):
        saved = checkpointer.metadata(path).item_metadata.tree
        return {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in saved.items()}


def load_checkpoint_params(
    step_folder: str, wanted: Mapping[str, jax.ShapeDtypeStruct] | None = None
) -> Params:
    """The parameters of one checkpoint.

    Args:
      step_folder: of the checkpoint.
      wanted: shapes, dtypes to cast to and shardings, by path; without a sharding a parameter
        becomes a NumPy array. None for NumPy arrays in the dtypes that were saved.

    Raises:
      CheckpointError: the folder is not a whole checkpoint.
    """
    wanted = checkpoint_shapes(step_folder) if wanted is None else wanted
    targets = {
        # Asked for NumPy arrays, Orbax does not look for the devices they were saved from.
        name: np.empty(leaf.shape, leaf.dtype) if leaf.sharding is None else leaf
        for name, leaf in wanted.items()
    }
    with _whole_checkpoint(step_folder) as (checkpointer, path):
        # Not strict: another mesh may have filled up the vocabulary by another number of zeros.
        found = checkpointer.restore(path, targets, strict=False)
    for name, leaf in found.items():
        if isinstance(leaf, np.ndarray):
            found[name] = leaf[tuple(slice(size) for size in wanted[name].shape)]
    return unflatten(found)


@contextlib.contextmanager
def _whole_checkpoint(step_folder: str) -> Iterator[tuple[ocp.StandardCheckpointer, str]]:
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            yield checkpointer, os.path.join(step_folder, "params")
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{step_folder}: not a whole checkpoint: {error}") from error


def _others(state: TrainState) -> dict[str, Any]:
    """What only some objectives and references have."""
    others = {"reference": state.reference, "kept": state.objective_state}
    return {name: tree for name, tree in others.items() if tree}


def _newest(folder: str) -> str:
    """The last whole checkpoint in a folder of them, for messages."""
    steps = [name for name in entries(folder) if name.isdigit()]
    return os.path.join(folder, max(steps, key=int)) if steps else "none was saved yet"


def _is_step(folder: str, name: str) -> bool:
    """Whether a step is whole: in a bucket a file that is written last says so."""
    step = epath.Path(folder) / name
    return is_folder(step / "params") and ocp.utils.is_checkpoint_finalized(step)


def _wanted(tree: Any) -> ocp.args.StandardRestore:
    """What is restored like the arrays of a tree. A mesh fills vocabularies up with zeros, so those
    of another mesh are cut off or added to; but for moments in 8 bits, whose blocks may be others
    then."""
    in_blocks = any(leaf.dtype in (np.int8, np.uint8) for leaf in jax.tree.leaves(tree))
    return ocp.args.StandardRestore(abstract(tree), strict=in_blocks)


def abstract(tree: Any) -> Any:
    """Shapes, dtypes and shardings of arrays, without their numbers."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), tree
    )
