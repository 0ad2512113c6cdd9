"""The parameters of the steps where held-out rows were best, in `best/` of a run."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from collections.abc import Collection

import orbax.checkpoint as ocp

from mmpo_jax.checkpoints.digests import digests
from mmpo_jax.checkpoints.steps import (
    CHECKPOINTS,
    PARAMS,
    CheckpointError,
    read_items,
    read_run,
    sealed,
    steps_in,
    writing,
)
from mmpo_jax.checkpoints.train_state import TrainState, abstract
from mmpo_jax.core.buckets import absolute, remove_tree
from mmpo_jax.core.processes import on_one

BEST = "best"
"""Folder beside `checkpoints/`."""


class BestSteps:
    """Writes parameters in the background, and reads those of one step again."""

    def __init__(self, folder: str | os.PathLike[str]):
        """
        Args:
          folder: of the run.
        """
        self.folder = absolute(os.path.join(folder, BEST))
        self.checkpoints = absolute(os.path.join(folder, CHECKPOINTS))

    @functools.cached_property
    def manager(self) -> ocp.CheckpointManager:
        """What writes; begins to look at the folder when it is asked for."""
        # It may be writing while that of the checkpoints is: their barriers need other names.
        processes = ocp.options.MultiprocessingOptions(barrier_sync_key_prefix=BEST)
        options = ocp.CheckpointManagerOptions(
            cleanup_tmp_directories=True, multiprocessing_options=processes
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
        params = {**state.params, **state.frozen}
        known = score if math.isfinite(score) else None
        run = sealed({"score": known, "digests": {PARAMS: digests(params)}})
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

    def has(self, step: int) -> bool:
        """Whether a step is there."""
        return step in on_one(lambda: steps_in(self.folder))

    def forget_after(self, step: int) -> None:
        """Removes the steps after one that a run goes on from, which are made again; before
        anything is saved."""

        def remove() -> None:
            for number in steps_in(self.folder):
                if number > step:
                    remove_tree(os.path.join(self.folder, str(number)))

        on_one(remove)

    def restore(self, step: int, state: TrainState) -> TrainState:
        """The state with the parameters of a step.

        Raises:
          CheckpointError: they are not there, or not what was saved.
        """
        with writing(self.folder, self.checkpoints):
            self.manager.wait_until_finished()
        folder = os.path.join(self.folder, str(step))
        if not self.has(step):
            raise CheckpointError(f"{folder}: the best step is not there any more")
        shapes = abstract({**state.params, **state.frozen})
        known = on_one(lambda: read_run(folder)).get("digests", {})
        params = read_items(folder, {PARAMS: shapes}, known)[PARAMS]
        return dataclasses.replace(
            state,
            params={path: params[path] for path in state.params},
            frozen={path: params[path] for path in state.frozen},
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
