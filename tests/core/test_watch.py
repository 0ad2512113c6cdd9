"""Processes that give no sign of life are noticed, by the first one's list of them."""

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


def test_one_process_tells_nobody():
    watch.stop_others("a reason")
    assert not watch.is_failing()
