"""The parameters of the steps where held-out rows were best, in `best/` of a run."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import math
import os
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import orbax.checkpoint as ocp

from mmpo_jax.checkpoints.digests import digests
from mmpo_jax.checkpoints.steps import (
    CHECKPOINTS,
    PARAMS,
    CheckpointError,
    DamagedError,
    check_identity,
    read_items,
    read_run,
    sealed,
    set_aside,
    steps_in,
    writing,
)
from mmpo_jax.checkpoints.train_state import TrainState, abstract, saved_params
from mmpo_jax.core.buckets import absolute, remove_tree
from mmpo_jax.core.processes import on_one

log = logging.getLogger(__name__)

BEST = "best"
"""Folder beside `checkpoints/`."""


class BestSteps:
    """Writes parameters in the background, and reads those of one step again."""

    def __init__(self, folder: str | os.PathLike[str], identity: Mapping[str, Any]):
        """
        Args:
          folder: of the run.
          identity: everything the run is made of, as JSON.
        """
        self.identity = json.loads(json.dumps(identity))  # as it is read again
        self.folder = absolute(os.path.join(folder, BEST))
        self.checkpoints = absolute(os.path.join(folder, CHECKPOINTS))

    @functools.cached_property
    def manager(self) -> ocp.CheckpointManager:
        """What writes; begins to look at the folder when it is asked for."""
        # It may be writing while that of the checkpoints is: their barriers need other names.
        processes = ocp.options.MultiprocessingOptions(barrier_sync_key_prefix=BEST)
        options = ocp.CheckpointManagerOptions(
            cleanup_tmp_directories=True,
            multiprocessing_options=processes,
            single_host_load_and_broadcast=True,
        )
        return ocp.CheckpointManager(self.folder, options=options)

    def save(self, step: int, state: TrainState, score: float) -> None:
        """Writes the parameters of a step, unless they are there already.

        Args:
          step: updates done.
          state: after them; copied before this returns.
          score: greater where the step is better.

        Raises:
          CheckpointError: these, or those before, cannot be written.
        """
        params = saved_params(state)
        known = score if math.isfinite(score) else None
        run = {"identity": self.identity, "score": known, "digests": {PARAMS: digests(params)}}
        run = sealed(run)
        args = ocp.args.Composite(params=ocp.args.StandardSave(params), run=ocp.args.JsonSave(run))
        with writing(self.folder, self.checkpoints):
            if step not in self.manager.all_steps():
                self.manager.save(step, args=args, force=True)

    def wait(self) -> None:
        """Waits until what is being written is there.

        Raises:
          CheckpointError: it cannot be written.
        """
        if "manager" in vars(self):
            with writing(self.folder, self.checkpoints):
                self.manager.wait_until_finished()

    def keep(self, steps: Collection[int]) -> None:
        """Removes all steps but these, once what is being written is there.

        Raises:
          CheckpointError: it cannot be written.
        """
        with writing(self.folder, self.checkpoints):
            self.manager.wait_until_finished()
            for step in self.manager.all_steps():
                if step not in steps:
                    self.manager.delete(step)

    def steps(self) -> list[int]:
        """The steps that are there, whole or not, once what is being written is."""
        self.wait()
        return on_one(lambda: steps_in(self.folder))

    def begin(self) -> None:
        """Removes all steps, which a run that begins anew makes again; before anything is saved.

        Raises:
          CheckpointError: they are of another run, which may have nothing but these.
        """
        on_one(self._check_all)
        self.forget_after(-1)

    def _check_all(self) -> None:
        for step in steps_in(self.folder):
            folder = os.path.join(self.folder, str(step))
            try:
                run = read_run(folder)
            except DamagedError as error:
                set_aside(folder, str(error), "a new one")
                continue
            if "identity" not in run:
                raise CheckpointError(
                    f"{folder}: does not say which run it is of, and there is no checkpoint beside "
                    "it; give another output folder or move it away"
                )
            check_identity(self.folder, run["identity"], self.identity)

    def forget_after(self, step: int) -> None:
        """Removes the steps after one that a run goes on from, which are made again; before
        anything is saved."""

        def remove() -> None:
            for number in steps_in(self.folder):
                if number > step:
                    remove_tree(os.path.join(self.folder, str(number)))

        on_one(remove)

    def first_whole(self, steps: Sequence[int], state: TrainState) -> tuple[int, TrainState] | None:
        """(the first of some steps that is whole, the state with its parameters); None where none
        of them is. Damaged ones are set aside, and so told of before a training is over.

        Raises:
          CheckpointError: one cannot be read now.
        """
        for place, step in enumerate(steps):
            folder = os.path.join(self.folder, str(step))
            try:
                return step, self.restore(step, state)
            except DamagedError as error:
                others = steps[place + 1 :]
                instead = f"step {others[0]}" if others else "the last step"
                if step in self.steps():
                    on_one(functools.partial(set_aside, folder, str(error), instead))
                    if "manager" in vars(self):
                        self.manager.reload()
                else:
                    log.warning("%s. Passed over for %s", error, instead)
        return None

    def restore(self, step: int, state: TrainState) -> TrainState:
        """The state with the parameters of a step.

        Raises:
          DamagedError: they are not there, or not what was saved.
          CheckpointError: they cannot be read now.
        """
        folder = os.path.join(self.folder, str(step))
        if step not in self.steps():
            raise DamagedError(f"{folder}: the best step is not there any more")
        shapes = abstract(saved_params(state))
        known = on_one(lambda: read_run(folder)).get("digests", {})
        params = read_items(folder, {PARAMS: shapes}, known)[PARAMS]
        return dataclasses.replace(
            state,
            params={path: params[path] for path in state.params},
            frozen={path: params.get(path, leaf) for path, leaf in state.frozen.items()},
        )

    def close(self) -> None:
        """Waits until all is written.

        Raises:
          CheckpointError: it cannot be written.
        """
        if "manager" in vars(self):
            with writing(self.folder, self.checkpoints):
                self.manager.close()


def best_of(folder: str, steps: Collection[int]) -> int:
    """Which of the steps in `best/` is the best: the first of those with the greatest score."""
    if len(steps) == 1:
        return next(iter(steps))

    def score(step: int) -> float:
        known = read_run(os.path.join(folder, str(step))).get("score")
        return -math.inf if known is None else known

    return max(sorted(steps), key=score)
