"""Being asked to stop: a signal that one process gets, and the step at which all stop."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


class StopSignal:
    """Listens for SIGTERM while training runs, which then ends with a checkpoint."""

    def __init__(self, mesh: Mesh):
        """
        Args:
          mesh: the devices, over which processes tell each other.
        """
        self.asked = False
        self._several = jax.process_count() > 1
        self._split = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._any = jax.jit(
            lambda flags: flags.any(), out_shardings=NamedSharding(mesh, PartitionSpec())
        )
        self._before: Any = None
        self._told: jax.Array | None = None

    def is_agreed(self) -> bool:
        """Whether to stop after this step; the same in all processes, which call it once a step.

        What they know goes around beside the next step, so a stop comes a step later than where
        there is one process, and no step waits for it.
        """
        if not self._several:
            return self.asked
        before, self._told = self._told, self._any_asked()
        return before is not None and bool(before)

    def is_agreed_in_the_end(self) -> bool:
        """Whether anybody was asked until now; the same in all processes, which call it once,
        behind the last step, and wait for each other."""
        return bool(self._any_asked()) if self._several else self.asked

    def _any_asked(self) -> jax.Array:
        """bool[]: whether a process was asked; all have to call this."""
        flag = np.array([self.asked])
        flags = jax.make_array_from_callback((self._split.mesh.size,), self._split, lambda _: flag)
        return self._any(flags)

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._ask)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
            if self.asked and error is None:  # when nobody looked any more: it is the caller's
                signal.raise_signal(signal.SIGTERM)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
