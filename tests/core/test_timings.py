"""What stages took, in the file beside them."""

import contextlib
import logging
import types

import pyarrow as pa
import pytest

from mmpo_jax.core import stages, timings
from mmpo_jax.core.stages import Stage, run_stage
from mmpo_jax.core.timings import add_time, rates, read_timings, timed


@pytest.fixture
def clock(monkeypatch):
    clock = types.SimpleNamespace(now=0.0)
    seconds = types.SimpleNamespace(perf_counter=lambda: clock.now)
    monkeypatch.setattr(timings, "time", seconds)
    monkeypatch.setattr(stages, "time", seconds)
    return clock


class Killed(BaseException):
    """What nothing expects."""


def tokens(counts):
    return pa.table({"num_tokens": counts})


def make(stage, clock, parts):
    """Runs a stage whose parts are these tables, of 2 s each; None kills it."""

    def make_part(number):
        clock.now += 2.0
        if parts[number] is None:
            raise Killed
        return parts[number]

    with contextlib.suppress(Killed):
        run_stage(stage, make_part)


def stage_of(folder, count, seed=0):
    return Stage(folder, "generate", {"model": "a"}, {"seed": seed}, count)


def without_keys(folder):
    return {
        name: {unit: amount for unit, amount in took.items() if unit != "key"}
        for name, took in read_timings(folder).items()
    }


def test_parts_add_up_over_a_kill(tmp_path, clock):
    """The part that was lost is made again, and counts when it is there."""
    first, second = tokens([3, 4]), tokens([5])
    make(stage_of(tmp_path, 2), clock, [first, None])
    assert without_keys(tmp_path) == {"generate": {"seconds": 2.0, "rows": 2, "tokens": 7}}
    make(stage_of(tmp_path, 2), clock, [None, second])
    expected = {"generate": {"seconds": 4.0, "rows": 3, "tokens": 12}}
    assert without_keys(tmp_path) == expected
    make(stage_of(tmp_path, 2), clock, [None, None])  # it is finished
    assert without_keys(tmp_path) == expected


def test_another_stage_of_the_name_begins_anew(tmp_path, clock):
    make(stage_of(tmp_path, 1), clock, [tokens([3])])
    make(stage_of(tmp_path, 1, seed=1), clock, [tokens([9])])
    assert without_keys(tmp_path) == {"generate": {"seconds": 2.0, "rows": 1, "tokens": 9}}


@pytest.mark.parametrize(
    ("counts", "total"),
    [
        ([[1, 2], [], [3]], 6),
        (pa.array([4, None, 5], pa.int32()), 9),
        (pa.array([], pa.int32()), 0),
    ],
)
def test_tokens_of_rows_and_of_their_responses(tmp_path, clock, counts, total):
    make(stage_of(tmp_path, 1), clock, [tokens(counts)])
    assert read_timings(tmp_path)["generate"]["tokens"] == total


def test_tables_do_not_depend_on_time(tmp_path, clock):
    for name in ("one", "other"):
        make(stage_of(tmp_path / name, 1), clock, [tokens([3])])
        clock.now += 1000.0
    for file in ("generate.parquet", "generate.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "other" / file).read_bytes()


def test_what_is_no_table(tmp_path, clock):
    """A training that is stopped and goes on; its rows count when it is done."""
    with contextlib.suppress(Killed), timed(str(tmp_path), "train", "a", {"rows": 5}):
        clock.now += 3.0
        raise Killed
    assert without_keys(tmp_path) == {"train": {"seconds": 3.0}}
    with timed(str(tmp_path), "train", "a", {"rows": 5}):
        clock.now += 7.0
    assert without_keys(tmp_path) == {"train": {"seconds": 10.0, "rows": 5}}


def test_rates():
    assert rates({"seconds": 2.0, "rows": 3, "tokens": 10}) == {"rows": 1.5, "tokens": 5.0}
    assert rates({"seconds": 2.0}) == rates({"seconds": 0.0, "rows": 3}) == {}


def test_the_log_says_how_fast_a_stage_was(tmp_path, clock, caplog):
    caplog.set_level(logging.INFO)
    make(stage_of(tmp_path, 2), clock, [tokens([3, 4]), tokens([5])])
    assert "generate: 3 rows in 4 s, 0.75 rows/s, 3 tokens/s" in caplog.messages


def test_a_file_that_cannot_be_written_is_no_failure(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    add_time(tmp_path / "file", "generate", "a", {"seconds": 1.0})
    assert "timings.json: cannot be written" in caplog.text
