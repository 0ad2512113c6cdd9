"""Moments on the host: the same training, whatever the mesh, through checkpoints too."""

import dataclasses

import jax
import numpy as np
import pytest
from helpers import tiny

from mmpo_jax.checkpoints.digests import digests
from mmpo_jax.checkpoints.run_checkpoints import Checkpoints
from mmpo_jax.objectives.terms import make_term
from mmpo_jax.parallel.mesh import make_mesh, put_batch
from mmpo_jax.recipes.optimizers import AdamW, Constant, Lion, Muon
from mmpo_jax.recipes.training import Training
from mmpo_jax.training.losses import make_loss
from mmpo_jax.training.offload import is_on_host
from mmpo_jax.training.optimizer import make_optimizer, make_schedule
from mmpo_jax.training.step import create_state, make_step

MESH = (1, 4, 2)
GIVEN = {"learning_rate": 1e-2, "weight_decay": 0.1, "max_grad_norm": 0.05}
"""With a norm that every gradient is clipped to."""
ADAMW, MUON = (kind(**GIVEN, epsilon=1e-3) for kind in (AdamW, Muon))
LION = Lion(**GIVEN)
NO_GRADIENT = "k_proj/bias"
"""Shifts all scores of a query alike, so of its gradient nothing but its sign's noise is left."""


class Run:
    """A training of a tiny model, step by step."""

    def __init__(self, model, params, config, offload, mesh=MESH):
        self.mesh = make_mesh(*mesh)
        config = config.model_copy(update={"offload": offload})
        schedule = make_schedule(Constant(warmup_ratio=0), config.learning_rate, 10)
        optimizer = make_optimizer(config, schedule, model.config.decoder.vocab_size)
        batch = tiny.random_batch(model.config, [6, 9] * 4, [(3, 5), (5, 1)] * 4)
        inputs = jax.tree.map(
            lambda leaf: leaf[None], tiny.train_batch(batch, np.zeros((8, 2), np.float32))
        )
        loss = make_loss(model, [make_term("dpo", beta=0.1)])
        with jax.set_mesh(self.mesh):
            self.batch = put_batch(inputs, self.mesh, leading=1)
            self.state = create_state(params, model, optimizer, (), self.mesh)
            self.update = make_step(loss, optimizer, schedule, self.state)

    def take(self, steps):
        with jax.set_mesh(self.mesh):
            for _ in range(steps):
                self.state, self.metrics = self.update(self.state, self.batch)
        return self


def assert_near(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for (path, one), other in zip(
        jax.tree.leaves_with_path(ours), jax.tree.leaves(theirs), strict=True
    ):
        name = jax.tree_util.keystr(path)
        if NO_GRADIENT not in name:
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=2e-6, err_msg=name)


@pytest.fixture(scope="module")
def adamw(tiny_model):
    """Two steps with moments on the devices, and on the host."""
    return tuple(Run(*tiny_model, ADAMW, offload).take(2) for offload in (False, True))


def test_moments_wait_on_the_host(adamw):
    here, there = (jax.tree.leaves(run.state.optimizer) for run in adamw)
    assert not any(map(is_on_host, here))
    # Counters, of moments and of the schedule, do not.
    assert [is_on_host(leaf) for leaf in there] == [leaf.ndim > 0 for leaf in there]
    assert any(map(is_on_host, there))
    for one, other in zip(here, there, strict=True):
        assert other.sharding.spec == one.sharding.spec


def test_the_steps_are_the_same(adamw):
    here, there = adamw
    assert float(there.metrics["grad_norm"]) > 0.05
    assert_near(there.state.params, here.state.params)
    assert_near(there.state.optimizer, here.state.optimizer)


@pytest.mark.slow
@pytest.mark.parametrize("config", [LION, MUON], ids=["lion", "muon"])
@pytest.mark.parametrize("mesh", [MESH, (1, 8, 1)], ids=str)
def test_other_optimizers_and_meshes(tiny_model, config, mesh):
    here, there = (Run(*tiny_model, config, offload, mesh).take(3) for offload in (False, True))
    assert_near(there.state.params, here.state.params)
    assert_near(there.state.optimizer, here.state.optimizer)


def test_checkpoints_go_either_way(adamw, tmp_path):
    """What was saved from the host goes on on the devices, and the other way round."""
    for name, one, other in (("devices", *adamw), ("host", *adamw[::-1])):
        folder = tmp_path / name
        run = Checkpoints(folder, {}, keep=1)
        run.save(2, one.state, {})
        run.close()
        restored, *_ = Checkpoints(folder, {}, keep=1).restore(other.state)
        assert digests(restored.optimizer) == digests(one.state.optimizer)
        for leaf, like in zip(
            jax.tree.leaves(restored.optimizer), jax.tree.leaves(other.state.optimizer), strict=True
        ):
            assert is_on_host(leaf) == is_on_host(like)


def test_a_step_that_is_not_finite_changes_nothing(tiny_model, adamw):
    run = Run(*tiny_model, ADAMW, True)
    run.update = adamw[1].update
    run.take(1)
    before = jax.tree.map(np.array, (run.state.params, run.state.optimizer))
    spoilt = jax.tree.map(lambda leaf: leaf * np.nan, run.batch.reference)
    run.batch = dataclasses.replace(run.batch, reference=spoilt)
    run.take(1)
    assert run.metrics["finite"] == 0
    for one, other in zip(
        jax.tree.leaves((run.state.params, run.state.optimizer)),
        jax.tree.leaves(before),
        strict=True,
    ):
        np.testing.assert_array_equal(one, other)


def test_moments_in_fewer_bytes_stay_on_the_devices():
    with pytest.raises(ValueError, match="moments on the host are float32, not int8"):
        AdamW(moments="int8", offload=True)


def test_a_run_may_go_on_either_way():
    here, there = (
        Training(objective={"type": "dpo"}, optimizer=AdamW(offload=offload))
        for offload in (False, True)
    )
    assert here.identity() == there.identity()
