"""The one thread that the devices work for: takes who asks and who hangs up, and tells them."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable

from mmpo_jax.generation.engine import Asked, Engine, Part

log = logging.getLogger(__name__)

FAILURES = 3
"""Failures of the devices one behind the other after which nothing more is tried."""

Tell = Callable[[list[Part] | Exception], None]
"""Is called in the worker's thread with what there is, or with what ended it."""


class Worker:
    """An engine in a thread of its own."""

    def __init__(self, engine: Engine, gave_up: Callable[[Exception], None]):
        """
        Args:
          engine: nobody else calls it.
          gave_up: is called in the worker's thread where the devices fail again and again.
        """
        self._engine, self._gave_up = engine, gave_up
        self._orders: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._tells: dict[Asked, Tell] = {}
        self._failures = 0
        self.known: Asked | None = None
        """A request that was answered once. Where it is answered again, a failure was of what was
        asked (too much for the devices' memory, say), not of the devices."""
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    def ask(self, asked: Asked, tell: Tell) -> None:
        """Asks for samples; `tell` is called until all have ended."""

        def begin() -> None:
            self._tells[asked] = tell
            self._engine.add(asked)

        self._orders.put(begin)

    def drop(self, asked: Asked, number: int | None = None) -> None:
        """Nobody waits any more for a sample, or for all of a request."""

        def end() -> None:
            self._engine.drop(asked, number)
            if number is None:
                self._tells.pop(asked, None)

        self._orders.put(end)

    def stop(self) -> None:
        """Ends the thread; who still waits is told nothing more."""
        self._orders.put(None)
        self._thread.join()

    def _work(self) -> None:
        while True:
            try:
                if not self._take_orders():
                    return
                self._tell(self._engine.advance())
                self._failures = 0
            except Exception as error:  # whatever JAX raises
                self._fail(error)
                if self._failures == FAILURES:
                    self._gave_up(error)
                    self._refuse(error)
                    return

    def _tell(self, parts: list[Part]) -> None:
        by_request: dict[Asked, list[Part]] = {}
        for part in parts:
            by_request.setdefault(part.asked, []).append(part)
        for asked, own in by_request.items():
            if asked in self._tells:
                self._tells[asked](own)

    def _take_orders(self) -> bool:
        """Does what was ordered, and waits for orders where there is nothing else to do; False
        where the thread is to end."""
        while True:
            try:
                order = self._orders.get(block=not self._engine.works)
            except queue.Empty:
                return True
            if order is None:
                return False
            order()

    def _refuse(self, error: Exception) -> None:
        """Tells everybody who still asks that nothing more is tried, until the thread is to end."""
        while (order := self._orders.get()) is not None:
            order()
            for tell in self._tells.values():
                tell(error)
            self._tells.clear()
            self._engine.reset()

    def _fail(self, error: Exception) -> None:
        """Tells everybody what ended their samples, and begins anew."""
        log.exception("the devices failed; all requests that were served are told")
        tells, self._tells = self._tells, {}
        for tell in tells.values():
            tell(error)
        self._engine.reset()
        self._failures = 0 if self._answers_known() else self._failures + 1

    def _answers_known(self) -> bool:
        if self.known is None:
            return False
        self._engine.add(self.known)
        try:
            while self._engine.works:
                if any(part.error for part in self._engine.advance()):
                    return False
        except Exception:
            log.exception("the devices do not answer either what they have answered before")
            self._engine.reset()
            return False
        return True
