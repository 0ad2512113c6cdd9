"""How fast a labeler answers, in a file beside the tables, which hold no time."""

from __future__ import annotations

import json
import os
import threading
import time

from mmpo_jax.core.buckets import entries
from mmpo_jax.core.files import read_json, write_atomic
from mmpo_jax.core.processes import on_one

FILE = "labeler_rate.json"
_lock = threading.Lock()


class BusyTime:
    """The time in which anybody is busy, as one or several threads at once are within `with`."""

    def __init__(self) -> None:
        """Nobody is busy yet."""
        self._lock = threading.Lock()
        self._busy = 0
        self._counted_to = 0.0
        self._seconds = 0.0

    def __enter__(self) -> None:
        with self._lock:
            self._count()
            self._busy += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._count()
            self._busy -= 1

    def take(self) -> float:
        """Seconds since the last call; those of who is still busy are counted up to now."""
        with self._lock:
            self._count()
            taken, self._seconds = self._seconds, 0.0
            return taken

    def _count(self) -> None:
        now = time.perf_counter()
        if self._busy:
            self._seconds += now - self._counted_to
        self._counted_to = now


def add_rate(folder: str, questions: int, seconds: float) -> None:
    """Adds up what a labeler was asked in a round, over all runs of it.

    Args:
      folder: of the round.
      questions: that were answered now.
      seconds: that it took, loading and compiling included.
    """
    on_one(lambda: _add(folder, questions, seconds))


def _add(folder: str, questions: int, seconds: float) -> None:
    path = os.path.join(folder, FILE)
    with _lock:
        before = read_json(path)
        total = {
            "questions": before.get("questions", 0) + questions,
            "seconds": before.get("seconds", 0.0) + seconds,
        }
        write_atomic(path, json.dumps(total).encode())


def read_rate(folder: str) -> float | None:
    """Questions per second in a round, of all of its folders; None where nobody was asked."""
    paths = [os.path.join(folder, place, FILE) for place in ("", *entries(folder))]
    totals = [read_json(path) for path in paths]
    seconds = sum(total.get("seconds", 0.0) for total in totals)
    return sum(total.get("questions", 0) for total in totals) / seconds if seconds else None
