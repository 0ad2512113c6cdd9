"""What a command is doing: said when nothing else was for a while, and never less often.

Whatever takes time is an activity (`doing`, `counted`); activities stand in each other, as a stage
does in a round. A thread of its own logs the innermost with how far it is, so that it is said too
while the main thread waits for a compiler or a device.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import TypeVar

log = logging.getLogger(__name__)

SILENCE = 8.0
"""Seconds without a word after which one is said; with what a busy machine adds, under ten."""

Item = TypeVar("Item")


@dataclasses.dataclass
class Activity:
    """Something that takes time."""

    name: str
    total: int | None = None
    """Number of what is counted; None where nothing is, or nobody knows."""
    unit: str = "rows"
    first: str = ""
    """What happens before the first is done, such as compiling."""
    done: int = 0
    measure: Callable[[], int] | None = None
    """Function that says how many are done, where nothing counts them as they are."""
    begun: float = dataclasses.field(default_factory=lambda: time.monotonic())
    counted_from: tuple[int, float] | None = None
    """(how many were done, when) at the first count: a rate that leaves out compiling."""

    def start_at(self, done: int) -> None:
        """Counts what was done before, which says nothing of how fast it goes."""
        self.done = done
        self.counted_from = (done, time.monotonic()) if done else None

    def reach(self, done: int) -> None:
        """Counts up to a number that is done."""
        if done > self.done:
            self.advance(done - self.done)

    def advance(self, count: int = 1) -> None:
        """Counts more that are done."""
        self.done += count
        if self.counted_from is None:
            self.counted_from = self.done, time.monotonic()

    def each(self, items: Iterable[Item]) -> Iterator[Item]:
        """The items; each counts as done when the next is asked for."""
        for item in items:
            yield item
            self.advance()

    def describe(self) -> str:
        """One line: what, how far, how fast, how long still, or for how long already."""
        if self.measure is not None:
            done = self.measure()
            self.reach(done if self.total is None else min(done, self.total))
        now = time.monotonic()
        seconds = f"{now - self.begun:.0f} s so far"
        if not self.done:
            counts = "" if self.total is None else f": 0 of {self.total} {self.unit}"
            return ", ".join(filter(None, [f"{self.name}{counts}", self.first, seconds]))
        of = "" if self.total is None else f" of {self.total}"
        line = f"{self.name}: {self.done}{of} {self.unit}"
        rate = self.rate(now)
        if not rate:
            return f"{line}, {seconds}"
        left = "" if self.total is None else f", {duration((self.total - self.done) / rate)} left"
        return f"{line}, {rate:.3g} {self.unit}/s{left}"

    def rate(self, now: float) -> float:
        """How many a second since the first, which may have waited for a compiler; 0 where nobody
        knows."""
        done, begun = self.counted_from or (0, self.begun)
        return (self.done - done) / (now - begun) if now > begun else 0.0


_activities: list[Activity] = []
_threads = threading.local()
"""Of a thread: whether what it does is said, see `aside`."""
_between = "working"
"""What is said outside of any."""
_last_word = time.monotonic()


@contextlib.contextmanager
def aside() -> Iterator[None]:
    """What this thread does within goes on beside what the command waits for: it is not said, and
    counts as no progress of that."""
    before, _threads.aside = _is_aside(), True
    try:
        yield
    finally:
        _threads.aside = before


def _is_aside() -> bool:
    return getattr(_threads, "aside", False)


@contextlib.contextmanager
def doing(
    name: str,
    total: int | None = None,
    unit: str = "rows",
    first: str = "",
    measure: Callable[[], int] | None = None,
) -> Iterator[Activity]:
    """What is done within, for who waits; see `Activity`."""
    global _between
    activity = Activity(name, total, unit, first, measure=measure)
    if _is_aside():
        yield activity
        return
    _between = "working"
    _activities.append(activity)
    try:
        yield activity
    finally:
        _activities[:] = [other for other in _activities if other is not activity]


def counted(items: Iterable[Item], name: str, unit: str = "rows") -> Iterator[Item]:
    """The items, as an activity that counts them; what is done with one belongs to it."""
    total = len(items) if isinstance(items, Collection) else None
    with doing(name, total, unit) as activity:
        for item in items:
            yield item
            activity.advance()


def advance(count: int = 1) -> None:
    """Counts more of the innermost activity that are done."""
    if _activities and not _is_aside():
        _activities[-1].advance(count)


def tell() -> None:
    """Logs what is being done, as it is worth a line whatever time has passed."""
    log.info("%s", describe())


def duration(seconds: float) -> str:
    """A duration for people: `40 s`, `12 min`, `3 h 5 min`."""
    minutes = round(seconds / 60)
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def spoken() -> None:
    """Something has been said that shows that work goes on."""
    global _last_word
    _last_word = time.monotonic()


@contextlib.contextmanager
def told() -> Iterator[None]:
    """Logs what is being done whenever nothing was said for `SILENCE` seconds."""
    global _between
    _between = "starting, loading libraries"
    spoken()
    over = threading.Event()
    thread = threading.Thread(target=_tell_until, args=(over,), name="progress", daemon=True)
    listener = _Listener()
    logging.getLogger().addHandler(listener)
    thread.start()
    try:
        yield
    finally:
        over.set()
        logging.getLogger().removeHandler(listener)


class _Listener(logging.Handler):
    """Hears what others log."""

    def emit(self, record: logging.LogRecord) -> None:
        spoken()


def _tell_until(over: threading.Event) -> None:
    while not over.wait(max(0.05, _last_word + SILENCE - time.monotonic())):
        if time.monotonic() - _last_word >= SILENCE:
            tell()
            spoken()  # whatever the log leaves out


def describe() -> str:
    """What is being done now: the innermost activity, with the names of those it stands in."""
    activities = list(_activities)
    if not activities:
        return _between
    *outer, last = activities
    return "".join(f"{activity.name}, " for activity in outer) + last.describe()
