"""The line on waiting, by a clock that only the fetches and steps of the tests move."""

import logging

import pytest

from mmpo_jax.training import waiting
from mmpo_jax.training.waiting import Waiting


class Clock:
    def __init__(self):
        self.now = 100.0

    def perf_counter(self):
        return self.now


class Output:
    """Of a step that ends at a time."""

    def __init__(self, clock, end):
        self.clock, self.end = clock, end

    def is_ready(self):
        return self.clock.now >= self.end

    def block_until_ready(self):
        self.clock.now = max(self.clock.now, self.end)


@pytest.fixture
def clock(monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    clock = Clock()
    monkeypatch.setattr(waiting, "time", clock)
    return clock


def train(clock, fetches, step):
    """Batches that take so long each, and steps of one duration that begin as the last ends."""
    measured = Waiting()
    for number, seconds in enumerate(fetches):

        def fetch(number=number, seconds=seconds):
            clock.now += seconds
            return number

        assert measured.fetch(fetch) == number
        before = measured.running.end if measured.running else 0.0
        measured.dispatched(Output(clock, max(before, clock.now) + step))
    return measured


def test_fast_data_are_not_waited_for(clock, caplog):
    measured = train(clock, [50.0, 1.0, 1.0, 1.0], step=10.0)
    assert measured.seconds == 0  # the first fetch fills the pipeline
    measured.log_summary()
    assert caplog.messages == ["waited for data 0.0 % of 40 s"]


def test_slow_data_are_waited_for(clock, caplog):
    """Fetches of 30 s beside steps of 10 s: an upper bound, as all of a late fetch counts."""
    measured = train(clock, [50.0, 30.0, 30.0], step=10.0)
    assert measured.seconds == 60
    measured.log_summary()
    assert caplog.messages == ["waited for data 85.7 % of 70 s"]


def test_one_step_at_most_is_ahead_of_the_data(clock):
    """The third batch is there at once, but is dispatched only when the first step has ended."""
    train(clock, [0.0, 0.0, 0.0], step=10.0)
    assert clock.now == 120.0


def test_time_of_rollouts(clock, caplog):
    measured = train(clock, [30.0, 30.0], step=10.0)
    measured.log_rollouts(50.0)
    assert caplog.messages == ["rollouts 71.4 %, steps and the rest 28.6 % of 70 s"]


@pytest.mark.parametrize(
    ("report", "line"),
    [
        (Waiting.log_summary, "waited for data 75.0 % of 40 s"),
        (
            lambda measured: measured.log_rollouts(35.0),
            "rollouts 50.0 %, steps and the rest 50.0 % of 70 s",
        ),
    ],
)
def test_validation_and_checkpoints_do_not_count(clock, caplog, report, line):
    """The step before them does, to its end: 10 s of it were left."""
    measured = train(clock, [30.0], step=10.0)
    with measured.paused():
        assert clock.now == 140.0
        clock.now += 1000.0
    measured.fetch(lambda: setattr(clock, "now", clock.now + 30.0))
    report(measured)
    assert caplog.messages == [line]


def test_nothing_was_trained(clock, caplog):
    Waiting().log_summary()
    Waiting().log_rollouts(0.0)
    assert caplog.messages == []
