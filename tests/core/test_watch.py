"""Processes that give no sign of life are noticed, by the first one's list of them."""

import threading

import pytest

from mmpo_jax.core import watch


class Store:
    """A key-value store as JAX's."""

    def __init__(self):
        self.values = {}

    def key_value_dir_get(self, folder):
        return [(key, value) for key, value in self.values.items() if key.startswith(folder)]


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(watch.time, "monotonic", lambda: now[0])
    return now


def test_who_is_silent(clock):
    store, heard = Store(), {"1": ("", 100.0), "2": ("", 100.0)}
    for seconds in range(0, 60, 5):
        clock[0] = 100.0 + seconds
        store.values[f"{watch.ALIVE}1"] = str(seconds)
        if seconds < 20:
            store.values[f"{watch.ALIVE}2"] = str(seconds)
        expected = ["2"] if seconds > 15 + watch.SILENCE else []
        assert watch._silent(store, heard) == expected


def test_who_has_left_may_be_silent(clock):
    store, heard = Store(), {"1": ("", 100.0)}
    clock[0] += 1000
    assert watch._silent(store, heard) == ["1"]
    store.values[f"{watch.LEFT}1"] = ""
    assert watch._silent(store, heard) == []


@pytest.mark.parametrize(
    ("reason", "status"),
    [
        (f"process 12 {watch.TOLD_TO_END}", 0),
        ("process 1 stopped: 7.png: the file is missing", 1),
        (f"process 1 stopped: it {watch.TOLD_TO_END}", 1),
    ],
)
def test_others_end_as_the_one_whose_reason_it_is(monkeypatch, capsys, reason, status):
    ended = []
    monkeypatch.setattr(watch.os, "_exit", ended.append)
    watch._end(reason)
    assert ended == [status] and capsys.readouterr().err == f"mmpo: {reason}\n"


@pytest.mark.parametrize(("answers", "seconds"), [([], 30), ([1, 1, 0, 0, 1], 55)])
def test_a_store_that_does_not_answer(monkeypatch, answers, seconds):
    answered, slept, ended = threading.Event(), [], []

    def sleep(interval):
        slept.append(interval)
        if answers and answers.pop(0):
            answered.set()

    monkeypatch.setattr(watch.time, "sleep", sleep)
    monkeypatch.setattr(watch, "_end", ended.append)
    for event in ("_failing", "_finishing"):  # which a command before may have set
        monkeypatch.setattr(watch, event, threading.Event())
    watch._miss(answered)
    assert sum(slept) == seconds
    assert ended == ["process 0 cannot be reached: no answer for 30 s"]


def test_one_process_tells_nobody(monkeypatch):
    monkeypatch.setattr(watch, "_failing", threading.Event())
    watch.stop_others("a reason")
    assert not watch.is_failing()
