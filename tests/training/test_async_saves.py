"""Checkpoints are written while training goes on, and hold the state of their step."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
from helpers.loop_runs import same

from mmpo_jax.checkpoints import run_checkpoints
from mmpo_jax.checkpoints.run_checkpoints import Checkpoints
from mmpo_jax.checkpoints.steps import read_run
from mmpo_jax.checkpoints.train_state import TrainState, abstract
from mmpo_jax.training import loop


class Slow(dict):
    """Is written as JSON when an event comes."""

    def __init__(self, values, event):
        super().__init__(values)
        self.event = event

    def items(self):
        if threading.current_thread() is not threading.main_thread():
            assert self.event.wait(60)
        return super().items()


def test_steps_are_done_while_a_checkpoint_is_written(run, undisturbed, tmp_path, monkeypatch):
    """The one of step 2 cannot be finished before the batch of step 4 is taken."""
    event, taken, put_batch = threading.Event(), [], loop.put_batch
    sealed = run_checkpoints.sealed

    def slow_once(values):
        first = not event.is_set()
        return Slow(sealed(values), event) if first else sealed(values)

    def put(*args, **options):
        taken.append((tmp_path / "checkpoints" / "2").exists())
        if len(taken) == 4:
            event.set()
        return put_batch(*args, **options)

    monkeypatch.setattr(run_checkpoints, "sealed", slow_once)
    monkeypatch.setattr(loop, "put_batch", put)
    same(run(tmp_path), undisturbed[1])
    assert taken[:4] == [False] * 4
    folders = (tmp_path, undisturbed[0])
    for step in ("4", "6", "8"):
        ours, theirs = (read_run(str(folder / "checkpoints" / step)) for folder in folders)
        assert ours == theirs


def test_a_state_may_be_donated_once_save_returns(tmp_path):
    """What is written is what it was, and not what took its place."""
    update = jax.jit(lambda x: x * 0 - 1, donate_argnums=0)
    before = np.random.default_rng(0).standard_normal(2**23).astype(np.float32)
    arrays = [{name: jnp.array(before)} for name in "ab"]
    state = TrainState(jnp.int32(3), arrays[0], {}, arrays[1], is_halted=jnp.bool_(False))
    shapes = abstract(state)
    checkpoints = Checkpoints(tmp_path, {}, 1)
    checkpoints.save(3, state, {})
    for leaf in (state.params["a"], state.optimizer["b"]):
        update(leaf).block_until_ready()
    checkpoints.close()
    restored, *_ = Checkpoints(tmp_path, {}, 1).restore(shapes)
    np.testing.assert_array_equal(restored.params["a"], before)
    np.testing.assert_array_equal(restored.optimizer["b"], before)
