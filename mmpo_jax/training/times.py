"""Where the wall-clock time of a training goes."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax

log = logging.getLogger(__name__)

Batch = TypeVar("Batch")
State = TypeVar("State")

PARTS = ("data_wait", "rollout", "compile", "validation", "checkpoint")
"""What time is counted as; the rest is `compute`, in which steps run."""


class Times:
    """Splits the time that passes into `PARTS` and the rest, by what the main thread waits for.

    It waits for no step that would not be waited for anyway, so two parts are upper bounds: where a
    step ends while a batch is fetched, all of that counts as `data_wait`, and where one runs while
    the next is compiled, that counts as `compile`.
    """

    def __init__(self) -> None:
        self.begun = self.closed = time.perf_counter()
        self.spent = dict.fromkeys(PARTS, 0.0)
        """Seconds since the last `close`."""
        self.total = dict.fromkeys(PARTS, 0.0)
        """Seconds since the beginning."""
        self.first: float | None = None
        """Seconds that the first batch took, which fills the pipeline."""
        self.running: jax.Array | None = None
        self.shapes: set[Any] = set()

    def fetch(self, fetch: Callable[[], Batch], rollouts: Callable[[], float]) -> Batch:
        """A batch.

        Args:
          fetch: gives it.
          rollouts: seconds in which batches were sampled so far. Where that grows, no step ran, and
            what else `fetch` took was waiting for the one before.
        """
        begun, before = time.perf_counter(), rollouts()
        batch = fetch()
        seconds, sampled = time.perf_counter() - begun, rollouts() - before
        if self.first is None:
            self.first = seconds
        if sampled:
            self._spend("rollout", sampled)
        elif self.running is None or self.running.is_ready():  # type: ignore[attr-defined]
            self._spend("data_wait", seconds)
        return batch

    def start(
        self, update: Callable[[State, Any], tuple[State, Any]], state: State, batch: Any
    ) -> tuple[State, Any]:
        """Starts a step, and waits for the one before it: one at most is ahead of the data.

        Args:
          update: the step, compiled for every shape when it first comes.
          state, batch: what it is given.

        Returns:
          (the state, metrics of the step).
        """
        begun = time.perf_counter()
        state, metrics = update(state, batch)
        leaves, structure = jax.tree.flatten(batch)
        shapes = structure, *((leaf.shape, leaf.dtype) for leaf in leaves)
        if shapes not in self.shapes:
            self.shapes.add(shapes)
            self._spend("compile", time.perf_counter() - begun)
        if self.running is not None:
            self.running.block_until_ready()
        self.running = metrics["loss"]
        return state, metrics

    @contextlib.contextmanager
    def spending(self, part: str) -> Iterator[None]:
        """Counts what takes place within as a part, once the step that runs is done."""
        begun = self._now()
        yield
        self._spend(part, time.perf_counter() - begun)

    def close(self) -> dict[str, float]:
        """Seconds since the last call, or since the beginning, by part, once the step that runs is
        done: `PARTS` and `compute`, which add up to what passed."""
        now = self._now()
        rest = now - self.closed - sum(self.spent.values())
        split = {"compute": rest, **self.spent}
        self.closed, self.spent = now, dict.fromkeys(PARTS, 0.0)
        return split

    def log_summary(self) -> None:
        """Says in the log what share of the time was waiting for data, but for the first batch, or
        rollouts; beside steps, as validation and checkpoints do not count."""
        if self.first is None:
            return
        total = self.total
        seconds = self._now() - self.begun - total["validation"] - total["checkpoint"]
        if total["rollout"]:
            share = 100 * total["rollout"] / seconds
            log.info(
                "rollouts %.1f %%, steps and the rest %.1f %% of %.0f s",
                share,
                100 - share,
                seconds,
            )
            return
        seconds -= self.first
        waited = total["data_wait"] - self.first
        share = 100 * waited / seconds if seconds else 0.0
        log.info("waited for data %.1f %% of %.0f s", share, seconds)

    def _spend(self, part: str, seconds: float) -> None:
        self.spent[part] += seconds
        self.total[part] += seconds

    def _now(self) -> float:
        """The time at which the step that runs is done, in seconds."""
        if self.running is not None:
            self.running.block_until_ready()
        return time.perf_counter()
