"""Checkpoints of a training: written while it goes on, and the last whole one found again."""

from __future__ import annotations

import functools
import json
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import orbax.checkpoint as ocp

from mmpo_jax.checkpoints.best_steps import BestSteps
from mmpo_jax.checkpoints.digests import digests
from mmpo_jax.checkpoints.steps import (
    CHECKPOINTS,
    PARAMS,
    CheckpointError,
    DamagedError,
    check_identity,
    newest,
    read_items,
    read_run,
    sealed,
    set_aside,
    steps_in,
    unfinished_in,
    writing,
)
from mmpo_jax.checkpoints.train_state import TrainState, abstract, saved_params
from mmpo_jax.core.buckets import absolute
from mmpo_jax.core.processes import on_one
from mmpo_jax.parallel.mesh import put_whole

log = logging.getLogger(__name__)


class Checkpoints:
    """Saves a run's state as it goes and finds the last whole one again."""

    def __init__(self, folder: str | os.PathLike[str], identity: Mapping[str, Any], keep: int):
        """
        Args:
          folder: of the run; checkpoints go to `checkpoints/`.
          identity: everything the run is made of, as JSON: options, and fingerprints of what is
            large. Checkpoints of another run are refused.
          keep: how many to keep.
        """
        self.identity, self.keep = identity, keep
        self.folder = absolute(os.path.join(folder, CHECKPOINTS))
        self.best = BestSteps(folder, identity)
        self._found: list[int] = on_one(self._look)
        self._last = max(self._found, default=None)

    def _look(self) -> list[int]:
        for name in unfinished_in(self.folder):
            path = os.path.join(self.folder, name)
            log.warning("%s: was begun and not finished, passed over and removed", path)
        return steps_in(self.folder)

    @functools.cached_property
    def manager(self) -> ocp.CheckpointManager:
        """What writes. It begins to look at the folder when it is asked for, which is once it is
        known what there is damaged."""
        options = ocp.CheckpointManagerOptions(
            max_to_keep=self.keep,
            cleanup_tmp_directories=True,
            single_host_load_and_broadcast=True,  # file systems of networks show hosts other things
        )
        return ocp.CheckpointManager(self.folder, options=options)

    def latest(self) -> int | None:
        """The last step that is saved, or is being saved."""
        return self._last

    def steps(self) -> list[int]:
        """The steps that are saved, once what is being written is there.

        Raises:
          CheckpointError: it cannot be written.
        """
        with writing(self.folder, self.folder):
            self.manager.wait_until_finished()
        return list(self.manager.all_steps())

    def describe_latest(self) -> str:
        """The last good checkpoint's folder, for messages.

        Raises:
          CheckpointError: what is being written cannot be.
        """
        self.steps()
        return newest(self.folder)

    def save(
        self,
        step: int,
        state: TrainState,
        position: dict[str, Any],
        window: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        """Writes a checkpoint in the background.

        Args:
          step: updates done.
          state: all of it, copied before this returns: the next step may have its arrays.
          position: the data iterator's state.
          window: metrics of the steps since the last report, as JSON, where it is out of turn.

        Raises:
          CheckpointError: this one, or the one before, cannot be written.
        """
        items = _items(state)
        known = {name: digests(tree) for name, tree in items.items()}
        run = {"identity": self.identity, "position": position, "window": window, "digests": known}
        run = sealed(json.loads(json.dumps(run)))  # as it is read again
        trees = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
        self.best.wait()  # a run that goes on from this one needs what was best by then
        with writing(self.folder, self.folder):
            self.manager.save(step, args=ocp.args.Composite(run=ocp.args.JsonSave(run), **trees))
        self._last = step

    def restore(self, state: TrainState) -> tuple[TrainState, dict[str, Any], list[dict[str, Any]]]:
        """(the state of the last whole checkpoint in the given one's shapes and shardings, the data
        position, the window; see `save`). Damaged ones behind it are set aside.

        Args:
          state: arrays, or what `abstract` leaves of them; what is not saved is kept of it.

        Raises:
          CheckpointError: they are of another run, none is whole, or nothing was saved.
        """
        damaged: dict[int, str] = {}
        for step in self._found:
            folder = os.path.join(self.folder, str(step))
            try:
                run = on_one(functools.partial(read_run, folder))
                self._check_identity(folder, run)
                items = read_items(folder, abstract(_items(state)), run.get("digests", {}))
            except DamagedError as error:
                damaged[step] = str(error)
                continue
            on_one(functools.partial(self._set_aside, damaged, step))
            self._last = step
            log.info("continuing from step %d", step)
            return _resumed(step, items, state), run["position"], run.get("window", [])
        if not damaged:
            raise CheckpointError(f"{self.folder}: no checkpoint was saved here")
        raise CheckpointError(
            f"no checkpoint is whole: {'; '.join(damaged.values())}; "
            f"move {self.folder} away to begin anew"
        )

    def _check_identity(self, folder: str, run: Mapping[str, Any]) -> None:
        """
        Raises:
          DamagedError: the step does not say which run it is of.
          CheckpointError: it is of another one.
        """
        if not {"identity", "position"} <= run.keys():
            raise DamagedError(f"{folder}: not a whole checkpoint: it does not say of which run")
        check_identity(self.folder, run["identity"], self.identity)

    def _set_aside(self, damaged: Mapping[int, str], step: int) -> None:
        """Takes damaged steps out of the way of one that is whole."""
        for number, reason in damaged.items():
            set_aside(os.path.join(self.folder, str(number)), reason, f"step {step}")

    def close(self) -> None:
        """Waits until all is written.

        Raises:
          CheckpointError: the last one cannot be written.
        """
        try:
            if "manager" in vars(self):
                with writing(self.folder, self.folder):
                    self.manager.wait_until_finished()
                    self.manager.close()
        finally:
            self.best.close()


def _items(state: TrainState) -> dict[str, Any]:
    """What is saved of a state, by the names of the folders; some only some objectives and
    references have."""
    items = {PARAMS: saved_params(state), "optimizer": state.optimizer}
    others = {"reference": state.reference, "kept": state.objective_state}
    return items | {name: tree for name, tree in others.items() if tree}


def _resumed(step: int, items: Mapping[str, Any], like: TrainState) -> TrainState:
    params = items[PARAMS]
    return TrainState(
        put_whole(np.int32(step), like.step.sharding),
        {path: params[path] for path in like.params},
        {path: params.get(path, leaf) for path, leaf in like.frozen.items()},
        items["optimizer"],
        items.get("reference", {}),
        items.get("kept", {}),
        put_whole(np.bool_(False), like.step.sharding),
    )
