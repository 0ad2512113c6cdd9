"""SIGTERM while a stage trains."""

import signal

import pytest

from mmpo_jax.parallel.mesh import make_mesh
from mmpo_jax.training.stopping import StopSignal


@pytest.fixture
def outside():
    """The signals that whoever runs the stage gets."""
    got = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: got.append(number))
    yield got
    signal.signal(signal.SIGTERM, before)


def test_whoever_looks_keeps_it_to_the_stage(outside):
    class Stop(Exception):
        pass

    with pytest.raises(Stop), StopSignal(make_mesh()) as stop:
        assert not stop.is_agreed() and not stop.is_agreed_in_the_end()
        signal.raise_signal(signal.SIGTERM)
        assert stop.is_agreed() and stop.is_agreed_in_the_end()
        raise Stop
    assert outside == []


def test_when_nobody_looked_any_more_it_is_the_callers(outside):
    with StopSignal(make_mesh()):
        signal.raise_signal(signal.SIGTERM)
        assert outside == []
    assert outside == [signal.SIGTERM]
