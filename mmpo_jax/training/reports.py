"""What is said and saved of a training as it goes on: metrics, held-out rows, checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

import jax
import jax.numpy as jnp

from mmpo_jax.checkpoints.orbax import Checkpoints
from mmpo_jax.checkpoints.train_state import TrainState
from mmpo_jax.core import progress
from mmpo_jax.core.errors import Stopped
from mmpo_jax.data.pipeline import HostBatch
from mmpo_jax.recipes.training import Training
from mmpo_jax.training.metrics import MetricsWriter, means
from mmpo_jax.training.performance import Performance
from mmpo_jax.training.plan import TrainingError
from mmpo_jax.training.validation import Validator


class Reports:
    """Metrics, held-out rows and checkpoints of a run, every so many steps."""

    def __init__(
        self,
        config: Training,
        steps: int,
        checkpoints: Checkpoints,
        writer: MetricsWriter,
        validator: Validator | None,
        performance: Performance,
    ):
        """
        Args:
          config: the recipe's training section.
          steps: of the whole run.
          checkpoints: of the run.
          writer: of its metrics.
          validator: measures held-out rows, if there are any.
          performance: measures the steps.
        """
        self.config, self.steps = config, steps
        self.checkpoints, self.writer, self.validator = checkpoints, writer, validator
        self.performance, self.times = performance, performance.times
        self.window = Window(checkpoints)

    def begin(self, state: TrainState) -> None:
        """Measures held-out rows before the first step."""
        self.checkpoints.discard_best()  # of a run that ended before its first checkpoint
        if self.validator is not None:
            self.writer.record(0, self._validate(self.validator, 0, state))
            self._save_best(0, state)

    def started(self, step: int, host: HostBatch, metrics: Mapping[str, Any]) -> None:
        """A step was started on a batch, which gives these metrics."""
        self.window.add(step, host.ids, {**metrics, **host.metrics})
        self.performance.add(host.amounts)

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
        """
        with progress.doing("saving a checkpoint"):
            self.writer.flush()
            if self.checkpoints.latest() != step:
                self.checkpoints.save(step, state, position)
            self.checkpoints.describe_latest()  # which waits until it is written
        raise Stopped(f"saved step {step} of {self.steps}; the same command goes on from there")

    def report(self, step: int, state: TrainState, position: dict[str, Any]) -> None:
        """Writes metrics, measures held-out rows and saves checkpoints, each where it is due.

        Args:
          step: updates done.
          state: after them.
          position: of the data, after them.

        Raises:
          TrainingError: naming the first step that was not finite.
        """
        values = self.window.close(state)
        if self.validator is not None and self.validator.is_due(step, self.steps):
            values |= self._validate(self.validator, step, state)
            if self.validator.is_best(step):
                self._save_best(step, state)
        self.writer.write_step(step, values | self.performance.close())
        if step % self.config.save_every == 0 or step == self.steps or self.is_over():
            with progress.doing("saving a checkpoint"), self.times.spending("checkpoint"):
                self.writer.flush()
                self.checkpoints.save(step, state, position)

    def _validate(self, validator: Validator, step: int, state: TrainState) -> dict[str, float]:
        """Metrics of held-out rows."""
        with self.times.spending("validation"):
            return validator.measure(step, state)

    def _save_best(self, step: int, state: TrainState) -> None:
        with progress.doing("saving the best step"), self.times.spending("checkpoint"):
            self.checkpoints.save_best(step, state)


class Window:
    """The steps since the last report, whose metrics still lie on the devices."""

    def __init__(self, checkpoints: Checkpoints):
        self.checkpoints = checkpoints
        self.steps: list[tuple[int, tuple[str, ...], Mapping[str, Any]]] = []

    def add(self, step: int, ids: tuple[str, ...], metrics: Mapping[str, Any]) -> None:
        """A step was started on the rows of these ids."""
        self.steps.append((step, ids, metrics))

    def close(self, state: TrainState) -> dict[str, float]:
        """The metrics, see `means`, and begins anew.

        Args:
          state: after the steps; one that was not finite has not changed it.

        Raises:
          TrainingError: naming the first step that was not finite.
        """
        steps, self.steps = self.steps, []
        rows = jax.device_get([metrics for _, _, metrics in steps])
        for (step, ids, _), row in zip(steps, rows, strict=True):
            if not row["finite"]:
                broken = _not_finite({**state.params, **state.frozen})
                if broken is not None:
                    raise TrainingError(
                        f"step {step}: the weights themselves are not finite, whatever the rows: "
                        f"{broken}; last good checkpoint: {self.checkpoints.describe_latest()}"
                    )
                raise TrainingError(
                    f"step {step}: the loss is {row['loss']} and the gradient norm "
                    f"{row['grad_norm']}; rows of this batch: {', '.join(ids)}; "
                    f"last good checkpoint: {self.checkpoints.describe_latest()}"
                )
        together = means(rows)
        del together["finite"]
        return together


def _not_finite(params: Mapping[str, jax.Array]) -> str | None:
    """The path of a parameter with an infinity or NaN; None where all are finite."""
    return next((path for path, leaf in params.items() if not jnp.isfinite(leaf).all()), None)
