"""The split of a training's time, by a clock that only the fetches and steps of the tests move."""

import contextlib
import logging
import types

import numpy as np
import pytest

from mmpo_jax.training import times
from mmpo_jax.training.times import PARTS, Times


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


class Training:
    """Fetches, steps and rollouts that take as long as they are said to."""

    def __init__(self, clock):
        self.clock, self.measured = clock, Times()
        self.rollouts = 0.0

    def pass_time(self, seconds):
        self.clock.now += seconds

    def fetch(self, seconds, rollout=0.0):
        """A batch is there after so many seconds; a rollout waits for the step that runs."""

        def fetch():
            if rollout:
                if self.measured.running is not None:
                    self.measured.running.block_until_ready()
                self.pass_time(rollout)
                self.rollouts += rollout
            self.pass_time(seconds)
            return "batch"

        assert self.measured.fetch(fetch, lambda: self.rollouts) == "batch"

    def step(self, seconds, compiling=0.0, size=3):
        """A step of so many seconds begins as the last one ends."""

        def update(state, batch):
            self.pass_time(compiling)
            running = self.measured.running
            begun = max(self.clock.now, running.end if running else 0.0)
            return state + 1, {"loss": Output(self.clock, begun + seconds)}

        batch = {"ids": np.zeros(size, np.int32)}
        state, metrics = self.measured.start(update, 7, batch)
        assert state == 8 and metrics["loss"] is self.measured.running


@pytest.fixture
def clock(monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    clock = Clock()
    monkeypatch.setattr(times, "time", types.SimpleNamespace(perf_counter=clock.perf_counter))
    return clock


@pytest.fixture
def training(clock):
    return Training(clock)


def split_of(seconds):
    """What `close` gives where all other parts took no time."""
    return {"compute": 0.0, **dict.fromkeys(PARTS, 0.0), **seconds}


def test_every_second_is_of_one_part(training, clock):
    """Compiling, waiting, steps, validation and a checkpoint, over two reports."""
    begun = clock.now
    training.fetch(50.0)
    training.step(10.0, compiling=20.0)
    training.fetch(30.0)  # the step ends meanwhile, so all of it counts as waiting
    training.step(10.0)
    with training.measured.spending("validation"):  # once the step has ended
        training.pass_time(5.0)
    first = training.measured.close()
    assert first == split_of(
        {"data_wait": 80.0, "compile": 20.0, "compute": 10.0, "validation": 5.0}
    )
    with training.measured.spending("checkpoint"):
        training.pass_time(4.0)
    training.pass_time(1.0)  # what nobody counts
    training.fetch(1.0)
    training.step(10.0)
    second = training.measured.close()
    assert second == split_of({"checkpoint": 4.0, "compute": 11.0, "data_wait": 1.0})
    assert sum(first.values()) + sum(second.values()) == clock.now - begun


def test_fast_data_are_not_waited_for(training):
    training.fetch(50.0)
    training.step(10.0)
    for _ in range(3):
        training.fetch(1.0)
        training.step(10.0)
    assert training.measured.close() == split_of({"data_wait": 50.0, "compute": 40.0})


def test_one_step_at_most_is_ahead_of_the_data(training, clock):
    """The third batch is there at once, but the loop goes on only when the first step has ended."""
    for _ in range(3):
        training.fetch(0.0)
        training.step(10.0)
    assert clock.now == 120.0


def test_rollouts_are_no_waiting(training):
    """A rollout begins when the step before it has ended; its batch may be learned from again."""
    training.fetch(1.0, rollout=30.0)
    training.step(10.0)
    training.fetch(0.0)
    training.step(10.0)
    training.fetch(1.0, rollout=30.0)
    training.step(10.0)
    assert training.measured.close() == split_of({"rollout": 60.0, "compute": 32.0})


def test_every_new_shape_is_compiled(training):
    for size in (3, 3, 4, 3, 4):
        training.fetch(0.0)
        training.step(1.0, compiling=2.0, size=size)
    assert training.measured.close()["compile"] == 4.0


def test_a_stop_within_a_part_passes(training):
    with contextlib.suppress(KeyboardInterrupt), training.measured.spending("checkpoint"):
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("fetches", "line"),
    [
        ([50.0, 1.0, 1.0, 1.0], "waited for data 0.0 % of 40 s"),
        ([50.0, 30.0, 30.0], "waited for data 85.7 % of 70 s"),
    ],
)
def test_the_line_on_waiting(training, caplog, fetches, line):
    """The first fetch fills the pipeline and does not count."""
    for seconds in fetches:
        training.fetch(seconds)
        training.step(10.0)
    training.measured.log_summary()
    assert caplog.messages == [line]


def test_the_line_on_rollouts(training, caplog):
    for _ in range(2):
        training.fetch(0.0, rollout=25.0)
        training.step(10.0)
    training.measured.log_summary()
    assert caplog.messages == ["rollouts 71.4 %, steps and the rest 28.6 % of 70 s"]


def test_validation_and_checkpoints_do_not_count(training, caplog):
    training.fetch(30.0)
    training.step(10.0)
    with training.measured.spending("validation"):
        training.pass_time(500.0)
    with training.measured.spending("checkpoint"):
        training.pass_time(500.0)
    training.measured.close()
    training.fetch(30.0)
    training.measured.log_summary()
    assert caplog.messages == ["waited for data 75.0 % of 40 s"]


def test_nothing_was_trained(clock, caplog):
    Times().log_summary()
    assert caplog.messages == []
