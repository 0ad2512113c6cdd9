"""Checkpoints of a run in a bucket: the last whole one is taken, as on this machine."""

import logging

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import buckets, damage

from mmpo_jax.checkpoints.run_checkpoints import Checkpoints
from mmpo_jax.checkpoints.steps import CheckpointError, steps_in
from mmpo_jax.checkpoints.train_state import TrainState, abstract

IDENTITY = {"model": "a" * 64}


def state_of(step):
    values = [{name: jnp.full(300, step, jnp.float32)} for name in "ab"]
    return TrainState(jnp.int32(step), values[0], {}, values[1], is_halted=jnp.bool_(False))


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """The folder of gs://bucket/run/checkpoints, in which steps 2 and 4 are saved."""
    buckets.file_bucket(monkeypatch, tmp_path)
    checkpoints = Checkpoints("gs://bucket/run", IDENTITY, 2)
    for step in (2, 4):
        checkpoints.save(step, state_of(step), {"next_index": step}, [{"loss": 0.5}])
    checkpoints.close()
    return tmp_path / "bucket" / "run" / "checkpoints"


def restored():
    """(the number of the step, its values, the position, the window) of what is gone on from."""
    found = Checkpoints("gs://bucket/run", IDENTITY, 2).restore(abstract(state_of(0)))
    state, position, window = found
    return int(state.step), np.unique(state.params["a"]).tolist(), position, window


def test_the_last_one_is_taken(saved):
    assert restored() == (4, [4.0], {"next_index": 4}, [{"loss": 0.5}])


def test_a_damaged_one_is_set_aside(saved, caplog):
    damage.truncate(damage.largest(saved / "4" / "optimizer"))
    assert restored()[:3] == (2, [2.0], {"next_index": 2})
    assert "gs://bucket/run/checkpoints/4: not a whole checkpoint" in caplog.text
    assert "kept as gs://bucket/run/checkpoints/4.damaged" in caplog.text
    assert steps_in("gs://bucket/run/checkpoints") == [2]
    assert (saved / "4.damaged" / "run" / "metadata").is_file()


def test_one_without_the_file_that_comes_last_was_not_finished(saved, caplog):
    caplog.set_level(logging.WARNING)
    (saved / "4" / "commit_success.txt").unlink()
    assert restored()[0] == 2
    assert "checkpoints/4: was begun and not finished" in caplog.text


def test_another_run_is_refused(saved):
    other = Checkpoints("gs://bucket/run", {"model": "b" * 64}, 2)
    with pytest.raises(CheckpointError, match="of a run with another model, data or recipe: model"):
        other.restore(abstract(state_of(0)))
