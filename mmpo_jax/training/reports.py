"""What is said and saved of a training as it goes on: metrics, held-out rows, checkpoints."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import jax

from mmpo_jax.checkpoints.run_checkpoints import Checkpoints
from mmpo_jax.checkpoints.steps import CheckpointError, newest
from mmpo_jax.checkpoints.train_state import TrainState
from mmpo_jax.core import progress
from mmpo_jax.core.errors import Stopped
from mmpo_jax.core.processes import is_agreed, several
from mmpo_jax.recipes.training import Training
from mmpo_jax.training.metrics import MetricsWriter, as_json, means
from mmpo_jax.training.not_finite import Recorder, first_not_finite
from mmpo_jax.training.performance import Performance
from mmpo_jax.training.plan import TrainingError
from mmpo_jax.training.validation import Measurements, Validator

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class StartedStep:
    """A step whose metrics still lie on the devices."""

    step: int
    ids: tuple[str, ...]
    """Ids of its rows."""
    metrics: Mapping[str, Any]
    position: dict[str, Any]
    """Position of the data behind its batch."""


class Reports:
    """Metrics, held-out rows and checkpoints of a run, every so many steps."""

    def __init__(
        self,
        config: Training,
        steps: int,
        checkpoints: Checkpoints,
        writer: MetricsWriter,
        validator: Validator | None,
        measurements: Measurements | None,
        performance: Performance,
        recorder: Recorder,
        position: dict[str, Any],
        carried: Sequence[Mapping[str, Any]],
    ):
        """
        Args:
          config: the recipe's training section.
          steps: of the whole run.
          checkpoints: of the run.
          writer: of its metrics.
          validator: measures held-out rows, if there are any.
          measurements: what else is measured, if anything is.
          performance: measures the steps.
          recorder: keeps the batch of a step that was not finite.
          position: of the data, before the first step.
          carried: metrics of steps that were done before it and not reported yet.
        """
        self.config, self.steps = config, steps
        self.checkpoints, self.writer, self.validator = checkpoints, writer, validator
        self.measurements = measurements
        self.performance, self.recorder = performance, recorder
        self.position, self.carried = position, list(carried)
        self.window: list[StartedStep] = []
        """The steps since the last report, but for those `carried`; `position` is before them."""

    def begin(self, state: TrainState) -> None:
        """Measures before the first step."""
        self.checkpoints.best.begin()  # anew, where a run ended before its first checkpoint
        values: dict[str, float] = {}
        if self.validator is not None:
            values |= self._validate(self.validator, 0, state)
        if self.measurements is not None:
            values |= self._measure(self.measurements, 0, state)
        if values:
            self.writer.record(0, values)
        if self.validator is not None:
            self._save_best(self.validator, 0, state)

    def resume(self, step: int, state: TrainState) -> None:
        """Makes `best/` what it was at the step of a checkpoint that training goes on from, and
        looks whether the best step is still what was saved."""
        best = self.checkpoints.best
        best.forget_after(step)
        if self.validator is None:
            return
        if step in self.validator.best_steps() and step not in best.steps():  # a kill came between
            self._save_best(self.validator, step, state)
        self.best_whole(self.validator, state)

    def best_whole(self, validator: Validator, state: TrainState) -> tuple[int, TrainState] | None:
        """(the best step that is still what was saved, the state with its parameters); None where
        there is none."""
        with progress.doing("reading the best step"):
            there = self.checkpoints.best.steps()
            ranked = validator.ranked_steps()
            others = [step for step in ranked if step in there]
            steps = list(dict.fromkeys([*validator.best_steps(), *others]))
            found = self.checkpoints.best.first_whole(steps, state)
        damaged = steps[: steps.index(found[0])] if found else steps
        validator.lost.update(damaged, set(ranked) - set(there))
        return found

    def add(self, started: StartedStep) -> None:
        """A step was started."""
        self.window.append(started)

    def is_due(self, step: int) -> bool:
        """Whether there is something to report after this step."""
        return step % self.config.log_every == 0 or step == self.steps

    def is_over(self) -> bool:
        """Whether held-out rows have not been better for too long."""
        return self.validator is not None and self.validator.is_over()

    def save_and_stop(self, step: int, state: TrainState, position: dict[str, Any]) -> NoReturn:
        """Saves a checkpoint out of turn, as somebody asked the run to stop.

        Raises:
          Stopped: naming the step.
          TrainingError: see `report`.
        """
        with progress.doing("saving a checkpoint"):
            rows = [*self.carried, *self._close_window(state)]
            self.writer.flush()
            if self.checkpoints.latest() != step:
                self.checkpoints.save(step, state, position, as_json(rows))
            self.checkpoints.describe_latest()  # which waits until it is written
        raise Stopped(f"saved step {step} of {self.steps}; the same command goes on from there")

    def report(self, step: int, state: TrainState, position: dict[str, Any]) -> None:
        """Writes metrics, measures held-out rows and saves checkpoints, each where it is due.

        Args:
          step: updates done.
          state: after them.
          position: of the data, after them.

        Raises:
          TrainingError: naming the first step that was not finite; the state before it is saved.
        """
        values = means([*self.carried, *self._close_window(state)])
        self.carried = []
        del values["finite"]
        if self.validator is not None and self.validator.is_due(step, self.steps):
            values |= self._validate(self.validator, step, state)
            if step in self.validator.best_steps():
                self._save_best(self.validator, step, state)
        is_last = step == self.steps or self.is_over()
        if self.measurements is not None and self.measurements.is_due(step, is_last):
            values |= self._measure(self.measurements, step, state)
        self.writer.write_step(step, values | self.performance.close())
        if step % self.config.save_every == 0 or is_last:
            with progress.doing("saving a checkpoint"), self._saving():
                self.writer.flush()
                self.checkpoints.save(step, state, position)

    def _validate(self, validator: Validator, step: int, state: TrainState) -> dict[str, float]:
        """Metrics of held-out rows."""
        with self.performance.times.spending("validation"):
            return validator.measure(step, state)

    def _measure(
        self, measurements: Measurements, step: int, state: TrainState
    ) -> Mapping[str, float]:
        """Values of what else is measured."""
        with self.performance.times.spending("validation"):
            return measurements.measure(step, state)

    def _save_best(self, validator: Validator, step: int, state: TrainState) -> None:
        """Writes the parameters of a step that is among the best. Those before stay as long as a
        checkpoint is there for which they are the best: it may be the one to go on from."""
        with progress.doing("saving the best step"), self._saving():
            untils = (*self.checkpoints.steps(), step)
            needed = {best for until in untils for best in validator.best_steps(until)}
            self.checkpoints.best.keep(needed)
            self.checkpoints.best.save(step, state, validator.score(step))

    def _saving(self) -> contextlib.AbstractContextManager[None]:
        """Counts what takes place within as time of checkpoints."""
        return self.performance.times.spending("checkpoint")

    def _close_window(self, state: TrainState) -> list[Mapping[str, Any]]:
        """The metrics of the steps since the last report, on the host, and begins anew.

        Args:
          state: after them; of the last one that was finite.

        Raises:
          TrainingError: naming the first step that was not finite.
        """
        window, self.window = self.window, []
        rows = jax.device_get([started.metrics for started in window])
        for place, started in enumerate(window):
            if not rows[place]["finite"]:
                self._give_up(started, rows[: place + 1], state)
            self.position = started.position
        return rows

    def _give_up(
        self, started: StartedStep, rows: Sequence[Mapping[str, Any]], state: TrainState
    ) -> NoReturn:
        """Keeps what there is of a step that was not finite and of those before it.

        Args:
          started: the step.
          rows: metrics of the window's steps, the last of which it is.
          state: before it.
        """
        step, metrics = started.step, rows[-1]
        broken = first_not_finite({**state.params, **state.frozen})
        if broken is not None:
            told = (
                f"step {step}: the weights themselves are not finite, whatever the rows: {broken}"
            )
            self._finish_saving(told, lambda: None)
            raise TrainingError(f"{told}; {self._last_good()}")
        told = (
            f"step {step}: the loss is {metrics['loss']} and the gradient norm "
            f"{metrics['grad_norm']}; rows of this batch: {', '.join(started.ids)}"
        )

        def save() -> None:
            if self.checkpoints.latest() != step - 1 and step > 1:
                window = as_json([*self.carried, *rows[:-1]])
                self.checkpoints.save(step - 1, state, self.position, window)

        self._finish_saving(told, save)
        try:
            path = self.recorder.record(step, means([metrics]), self.position, state)
        except Exception as error:  # such as memory, of which there may be none left
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            told = f"{told}; the batch cannot be kept: {reason}"
        else:
            told = told if path is None else f"{told}; the batch is in {path}"
        raise TrainingError(f"{told}; {self._last_good()}")

    def _finish_saving(self, told: str, save: Callable[[], None]) -> None:
        """Saves, and waits until it is written. That it cannot be is not what stopped the run.

        Args:
          told: what did.
          save: begins to write what there is to be saved.

        Raises:
          TrainingError: it cannot be written in one process of several, for which the others wait
            until it ends.
        """
        try:
            with progress.doing("saving what was learned before"):
                save()
                self.checkpoints.steps()
        except CheckpointError as error:
            if several() and not is_agreed(error):
                raise TrainingError(f"{told}; {error}") from error
            log.warning("%s", error)

    def _last_good(self) -> str:
        return f"last good checkpoint: {newest(self.checkpoints.folder)}"
