"""How long training waited for data, or sampled them."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

import jax

log = logging.getLogger(__name__)

Batch = TypeVar("Batch")


class Waiting:
    """Adds up the time in which a batch was fetched and no step was running.

    An upper bound: where a step ends while a batch is fetched, all of that counts.
    """

    def __init__(self) -> None:
        self.begun = time.perf_counter()
        self.seconds = 0.0
        self.left_out = 0.0
        self.running: jax.Array | None = None
        self.started: float | None = None

    def fetch(self, fetch: Callable[[], Batch]) -> Batch:
        """What `fetch` gives; the first time does not count, as it fills the pipeline."""
        begun = time.perf_counter()
        batch = fetch()
        ended = time.perf_counter()
        if self.started is None:
            self.started = ended
        elif self.running is None or self.running.is_ready():  # type: ignore[attr-defined]
            self.seconds += ended - begun
        return batch

    def dispatched(self, output: jax.Array) -> None:
        """A step begins, of which this is an output."""
        if self.running is not None:
            self.running.block_until_ready()  # so that one step at most is ahead of the data
        self.running = output

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves out what takes place within: neither data nor a step, once the one that runs is
        done."""
        begun = self._now()
        yield
        self.left_out += time.perf_counter() - begun

    def log_summary(self) -> None:
        """Says in the log what share of the time was waiting."""
        if self.started is None:
            return
        elapsed = self._now() - self.started - self.left_out
        share = self.seconds / elapsed if elapsed else 0.0
        log.info("waited for data %.1f %% of %.0f s", 100 * share, elapsed)

    def log_rollouts(self, seconds: float) -> None:
        """Says in the log what share of the time rollouts took. During a rollout no step runs;
        compiling counts on both sides.

        Args:
          seconds: that rollouts took.
        """
        if self.started is None:
            return
        elapsed = self._now() - self.begun - self.left_out
        share = 100 * seconds / elapsed if elapsed else 0.0
        log.info(
            "rollouts %.1f %%, steps and the rest %.1f %% of %.0f s", share, 100 - share, elapsed
        )

    def _now(self) -> float:
        """The time at which the step that runs is done, in seconds."""
        if self.running is not None:
            self.running.block_until_ready()
        return time.perf_counter()
