"""Goodput over restarts, by a clock of the tests' own."""

import json
import types

import pytest

from mmpo_jax.training import goodput
from mmpo_jax.training.goodput import FILE, Goodput, first_start
from mmpo_jax.training.times import PARTS

IDENTITY = {"model": "a" * 64}


@pytest.fixture
def clock(monkeypatch):
    clock = types.SimpleNamespace(now=1000.0)
    monkeypatch.setattr(goodput, "time", types.SimpleNamespace(time=lambda: clock.now))
    return clock


def split_of(**seconds):
    return {"compute": 0.0, **dict.fromkeys(PARTS, 0.0), **seconds}


def test_time_in_steps_of_the_time_that_passed(clock):
    measured = Goodput(1000.0, [])
    clock.now = 1100.0
    measured.add(split_of(compute=40.0, rollout=20.0, data_wait=15.0, checkpoint=25.0))
    assert measured.share() == pytest.approx(0.6)
    assert measured.passed() == 100.0


def test_steps_that_a_kill_lost_count_once(clock):
    """Reports of ten steps each; killed after step 30, gone on from step 20 an hour later."""
    rows = [{"step": step, "perf/compute": 3.0, "perf/data_wait": 1.0} for step in (10, 20)]
    clock.now = 1000.0 + 3600.0
    again = Goodput(1000.0, rows)
    assert again.share() == pytest.approx(60.0 / 3600.0)
    clock.now += 40.0
    again.add(split_of(compute=30.0, data_wait=10.0))
    assert again.share() == pytest.approx(90.0 / 3640.0)


def test_lines_without_steps_or_measurements_count_nothing(clock):
    """That of step 0, and those of versions that measured nothing."""
    rows = [{"step": 0, "eval_loss": 0.7}, {"step": 5, "loss": 0.6}]
    clock.now = 1010.0
    assert Goodput(1000.0, rows).share() == 0.0


def test_no_time_has_passed(clock):
    assert Goodput(1000.0, []).share() == 1.0


def test_the_first_start_stays(tmp_path):
    first = first_start(str(tmp_path), IDENTITY, 1000.0)
    assert first.time == 1000.0 and len(first.id) == 16
    assert first_start(str(tmp_path), IDENTITY, 2000.0) == first


def test_another_run_begins_anew(tmp_path):
    first = first_start(str(tmp_path), IDENTITY, 1000.0)
    other = first_start(str(tmp_path), {"model": "b" * 64}, 2000.0)
    assert other.time == 2000.0 and other.id != first.id


def test_a_damaged_file_is_another_first_start(tmp_path):
    first_start(str(tmp_path), IDENTITY, 1000.0)
    (tmp_path / FILE).write_text("{")
    assert first_start(str(tmp_path), IDENTITY, 2000.0).time == 2000.0
    assert json.loads((tmp_path / FILE).read_text())["first_start"] == 2000.0
