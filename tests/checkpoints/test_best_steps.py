"""The best steps of a run: kept, named by their score, read back."""

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import damage

from mmpo_jax.checkpoints.best_steps import BestSteps
from mmpo_jax.checkpoints.orbax import find_checkpoint
from mmpo_jax.checkpoints.steps import CheckpointError, steps_in
from mmpo_jax.checkpoints.train_state import TrainState

RUN = {"model": "a", "training": {"beta": 0.1}}


def state_of(step):
    return TrainState(
        jnp.int32(step), {"a": jnp.full(3, step, jnp.float32)}, {"b": jnp.ones(2)}, ()
    )


@pytest.fixture
def best(tmp_path):
    """Steps 0, 2 and 4, of which 2 is the best."""
    (tmp_path / "base").mkdir()
    best = BestSteps(tmp_path, RUN)
    for step, score in ((0, float("nan")), (2, 5.0), (4, -1.0)):
        best.save(step, state_of(step), score)
    yield best
    best.close()


def test_they_are_read_back(best):
    for step in (0, 2, 4):
        restored = best.restore(step, state_of(9))
        np.testing.assert_array_equal(restored.params["a"], np.full(3, step))
        np.testing.assert_array_equal(restored.frozen["b"], np.ones(2))


def test_the_best_stands_for_the_run(best, tmp_path):
    best.keep({0, 2, 4})
    assert find_checkpoint(tmp_path)[0] == f"{tmp_path}/best/2"
    best.keep({0, 4})
    assert find_checkpoint(tmp_path)[0] == f"{tmp_path}/best/4"


def test_a_step_is_written_once(best, tmp_path):
    best.keep({0, 2, 4})
    file = damage.largest(tmp_path / "best" / "4")
    before = file.stat().st_mtime_ns
    best.save(4, state_of(4), -1.0)
    best.keep({0, 2, 4})
    assert file.stat().st_mtime_ns == before


def test_steps_that_are_done_again_are_forgotten(best, tmp_path):
    best.close()
    BestSteps(tmp_path, RUN).forget_after(2)
    assert steps_in(f"{tmp_path}/best") == [2, 0]
    BestSteps(tmp_path, RUN).forget_after(-1)
    assert steps_in(f"{tmp_path}/best") == []


def test_a_damaged_one_is_refused(best, tmp_path):
    best.keep({0, 2, 4})
    damage.truncate(damage.largest(tmp_path / "best" / "2" / "params"))
    with pytest.raises(CheckpointError, match="best/2"):
        best.restore(2, state_of(9))


def test_one_that_is_gone_is_named(best):
    with pytest.raises(CheckpointError, match="best/6: the best step is not there any more"):
        best.restore(6, state_of(9))


def test_the_next_best_is_taken_in_place_of_a_damaged_one(best, tmp_path, caplog):
    best.keep({0, 2, 4})
    damage.truncate(damage.largest(tmp_path / "best" / "2" / "params"))
    step, state = best.first_whole([2, 6, 4], state_of(9))
    assert step == 4
    np.testing.assert_array_equal(state.params["a"], np.full(3, 4))
    told = [each.getMessage() for each in caplog.records if each.name.startswith("mmpo_jax")]
    assert told[0].startswith(f"{tmp_path}/best/2: not a whole checkpoint")
    assert "Passed over for step 6; it is kept as" in told[0]
    assert told[1].endswith("is not there any more. Passed over for step 4")
    assert (tmp_path / "best" / "2.damaged").is_dir()
    assert best.first_whole([2], state_of(9)) is None
    best.keep({4})
    assert steps_in(f"{tmp_path}/best") == [4]


def test_those_of_another_run_are_not_removed(best, tmp_path):
    best.close()
    with pytest.raises(CheckpointError, match=r"best: .* training.beta \(0.1 there, 0.2 here\)"):
        BestSteps(tmp_path, {"model": "a", "training": {"beta": 0.2}}).begin()
    assert steps_in(f"{tmp_path}/best") == [4, 2, 0]
    BestSteps(tmp_path, RUN).begin()
    assert steps_in(f"{tmp_path}/best") == []
