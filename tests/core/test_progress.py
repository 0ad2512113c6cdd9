"""What is being done is said, however long the main thread waits."""

import itertools
import logging
import time

import pytest

from mmpo_jax.core import progress
from mmpo_jax.core.progress import Activity, counted, doing, duration, told


class Clock:
    def __init__(self):
        self.now = 50.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


@pytest.fixture
def activity(clock):
    """One with a total that began 10 seconds ago."""
    activity = Activity("scoring", 100, "rows", "compiling", begun=clock.now)
    clock.now += 10
    return activity


def test_before_the_first_is_done(activity):
    assert activity.describe() == "scoring: 0 of 100 rows, compiling, 10 s so far"
    activity.advance(20)  # nobody knows how much of it was the compiler
    assert activity.describe() == "scoring: 20 of 100 rows, 10 s so far"


def test_rates_leave_out_the_first(activity, clock):
    activity.advance(20)
    clock.now += 4
    activity.advance(20)
    assert activity.describe() == "scoring: 40 of 100 rows, 5 rows/s, 12 s left"


def test_what_was_done_before_says_nothing_of_the_rate(activity, clock):
    activity.start_at(60)
    assert activity.describe() == "scoring: 60 of 100 rows, 10 s so far"
    clock.now += 10
    activity.advance(20)
    assert activity.describe() == "scoring: 80 of 100 rows, 2 rows/s, 10 s left"


def test_what_is_measured_and_not_counted(clock):
    """When it is told of, and then only."""
    sizes = iter([10, 30])
    activity = Activity("writing", 40, "MB", measure=lambda: next(sizes), begun=clock.now)
    clock.now += 5
    assert activity.describe() == "writing: 10 of 40 MB, 5 s so far"
    clock.now += 5
    assert activity.describe() == "writing: 30 of 40 MB, 4 MB/s, 2 s left"


def test_what_is_measured_is_never_more_than_all(clock):
    """A file's format may add a little to what is written."""
    activity = Activity("writing", 4, "MB", measure=lambda: 5, begun=clock.now)
    clock.now += 2
    assert activity.describe().startswith("writing: 4 of 4 MB")


def test_without_a_total(clock):
    activity = Activity("reading", begun=clock.now)
    clock.now += 3
    assert activity.describe() == "reading, 3 s so far"
    activity.advance()
    clock.now += 2
    activity.advance(5)
    assert activity.describe() == "reading: 6 rows, 2.5 rows/s"


def test_activities_stand_in_each_other(clock):
    with doing("round 1/2"):
        with doing("generate", 9, "prompts"):
            progress.advance(3)
            assert progress.describe().startswith("round 1/2, generate: 3 of 9 prompts")
        assert progress.describe() == "round 1/2, 0 s so far"


def test_items_are_counted_and_an_end_before_the_last_is_one():
    items = counted(["a", "b", "c"], "looking")
    assert list(itertools.islice(items, 2)) == ["a", "b"]
    assert progress.describe().startswith("looking: 1 of 3 rows")
    items.close()
    assert progress._activities == []
    with pytest.raises(KeyError), doing("failing"):
        raise KeyError
    assert progress._activities == []
    assert list(counted(iter("ab"), "looking")) == ["a", "b"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (99, "99 s"), (100, "2 min"), (5400, "90 min"), (7500, "2 h 5 min")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def wait_for(caplog, count):
    until = time.monotonic() + 60
    while len(caplog.messages) < count and time.monotonic() < until:
        time.sleep(0.01)
    return caplog.messages


def test_silence_is_broken_from_another_thread(caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(progress, "SILENCE", 0.1)
    with told():
        assert wait_for(caplog, 1)[0] == "starting, loading libraries"
        with doing("compiling everything"):
            caplog.clear()
            assert wait_for(caplog, 2)[1].startswith("compiling everything, ")
    caplog.clear()
    time.sleep(0.3)
    assert caplog.messages == []


def test_nothing_is_said_while_others_speak(caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(progress, "SILENCE", 1000.0)
    with told():
        for say in (lambda: logging.getLogger("other").info("a line"), progress.spoken):
            monkeypatch.setattr(progress, "_last_word", 0.0)
            say()
            assert progress._last_word > 0
    assert caplog.messages == ["a line"]
