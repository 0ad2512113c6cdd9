"""The profiler's window of steps."""

import jax
import jax.numpy as jnp
import pytest
from helpers.loop_runs import CONFIG, same

from mmpo_jax.recipes.training import Profile
from mmpo_jax.training.profiling import Profiler


@pytest.fixture
def calls(monkeypatch):
    found = []
    monkeypatch.setattr(jax.profiler, "start_trace", found.append)
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: found.append("end"))
    return found


def steps(profiler, numbers, calls):
    for number in numbers:
        profiler.before(number)
        calls.append(number)
        profiler.after(number, jnp.zeros(()))
    profiler.close()


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        (range(1, 7), [1, 2, "out/profile", 3, 4, "end", 5, 6]),
        (range(4, 6), ["out/profile", 4, "end", 5]),  # a run that was stopped within
        (range(5, 7), [5, 6]),
        (range(1, 4), [1, 2, "out/profile", 3, "end"]),  # one that ends within
    ],
)
def test_the_window(calls, numbers, expected):
    steps(Profiler(Profile(start=3, steps=2), "out"), numbers, calls)
    assert calls == expected


def test_none_is_asked_for(calls):
    steps(Profiler(None, "out"), range(1, 20), calls)
    assert calls == list(range(1, 20))


def test_a_run_writes_a_trace_and_is_no_other_run(run, undisturbed, tmp_path):
    config = CONFIG.model_copy(update={"profile": Profile(start=2, steps=2)})
    assert config.identity() == CONFIG.identity()
    same(run(tmp_path, config=config), undisturbed[1])
    (trace,) = (tmp_path / "profile").rglob("*.xplane.pb")
    assert trace.stat().st_size > 0
