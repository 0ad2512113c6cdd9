"""Processes that work on parts: in order, with the errors of one's own process."""

import operator
import os
import signal
import time

import pytest

from mmpo_jax.core.errors import DataError
from mmpo_jax.core.workers import WorkerError, in_order


def slow_square(number, seconds):
    time.sleep(seconds)
    print("what is printed is no reply")
    return number**2


def refuse(number):
    raise DataError(f"row {number}")


class Unsent(Exception):
    def __init__(self, one, other):
        super().__init__(one)


def refuse_so(number):
    raise Unsent(number, number)


def end(number):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    """Workers import what they are asked for by its module."""
    monkeypatch.syspath_prepend(os.path.dirname(__file__))


def test_results_are_in_order_whoever_is_first():
    calls = [(number, 0.3 if number == 0 else 0) for number in range(6)]
    assert list(in_order(slow_square, calls, 2)) == [0, 1, 4, 9, 16, 25]


def test_few_arguments_are_taken_ahead():
    taken = []
    calls = ((taken.append(number) or number, number) for number in range(1, 100))
    results = in_order(operator.mul, calls, 2)
    assert next(results) == 1
    assert len(taken) <= 4
    results.close()


@pytest.mark.parametrize(
    ("function", "error", "said"),
    [
        (refuse, DataError, "row 1"),
        (refuse_so, WorkerError, "Unsent: 1"),
        (end, WorkerError, "killed, perhaps for want of memory"),
    ],
)
def test_what_goes_wrong_there_is_said_here(function, error, said):
    with pytest.raises(error, match=said):
        list(in_order(function, [(1,)], 2))


def test_workers_end_with_the_one_who_asked():
    before = time.monotonic()
    results = in_order(slow_square, [(1, 0), (2, 60)], 2)
    assert next(results) == 1
    results.close()
    assert time.monotonic() - before < 50
