"""Weights that are trained in bfloat16: updates survive, steps repeat, memory is told."""

import logging
import types

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import meshes, tiny
from jax.sharding import PartitionSpec

from mmpo_jax.objectives.sums import Sums
from mmpo_jax.parallel.mesh import make_mesh
from mmpo_jax.recipes.optimizers import AdamW
from mmpo_jax.recipes.training import Training
from mmpo_jax.training.memory import bytes_per_device, log_memory
from mmpo_jax.training.optimizer import make_optimizer
from mmpo_jax.training.step import create_state, make_step

RATE, STEPS = 2e-6, 5
MODEL = types.SimpleNamespace(rules=((r".*", PartitionSpec("fsdp")),))


def start():
    rng = np.random.default_rng(0)
    return {"dense": {"kernel": np.float32(rng.uniform(1, 2, (256, 256)))}}


def forward(params, batch):
    return batch[0] * params["dense"]["kernel"].astype(jnp.float32).sum()


LOSS = tiny.row_loss(forward, lambda out, batch: Sums(jnp.sum(out), jnp.float32(8), {}))


def trained(mesh, dtype, optimizer=None, seed=0):
    """The state after a few steps whose gradient is one for every weight."""
    optimizer = optimizer or optax.sgd(RATE)
    state = create_state(start(), MODEL, optimizer, (), mesh, param_dtype=dtype)
    step = make_step(LOSS, optimizer, lambda step: RATE, state, seed=seed)
    batch = (np.ones((2, 4, 1), np.float32), np.zeros((2, 4, 1), np.float32))  # two micro-batches
    for _ in range(STEPS):
        state, metrics = step(state, batch)
        assert metrics["finite"] == 1
    return state


@pytest.fixture(scope="module")
def one():
    return meshes.one_device()


def test_small_updates_survive_in_the_mean(one):
    """Each is a thousandth of half a step of a bfloat16 between 1 and 2."""
    before = np.float64(start()["dense"]["kernel"].astype(jnp.bfloat16))
    whole = np.float64(trained(one, jnp.float32).params["dense/kernel"])
    update = np.mean(whole) - np.mean(start()["dense"]["kernel"], dtype=np.float64)
    assert update < 0
    narrow = trained(one, jnp.bfloat16).params["dense/kernel"]
    assert narrow.dtype == jnp.bfloat16
    change = np.float64(narrow) - before
    moved = np.count_nonzero(change)
    assert 0 < moved < change.size / 50  # few, by 2^-7 each
    np.testing.assert_allclose(change[change != 0], -(2.0**-7), rtol=0.51)
    assert change.mean() == pytest.approx(update, rel=5 / np.sqrt(moved))


def test_steps_repeat_and_depend_on_the_seed_alone(one):
    first = np.float32(trained(one, jnp.bfloat16).params["dense/kernel"])
    np.testing.assert_array_equal(first, trained(one, jnp.bfloat16).params["dense/kernel"])
    eight = trained(make_mesh(1, 8, 1), jnp.bfloat16)
    assert not eight.params["dense/kernel"].sharding.is_fully_replicated
    np.testing.assert_array_equal(first, np.float32(eight.params["dense/kernel"]))
    other = np.float32(trained(one, jnp.bfloat16, seed=1).params["dense/kernel"])
    assert not np.array_equal(first, other)


def test_moments_are_those_of_float32(one):
    optimizer = make_optimizer(AdamW(), lambda step: RATE)
    for dtype in (jnp.float32, jnp.bfloat16):
        state = trained(one, dtype, optimizer)
        for name in ("mu", "nu"):
            leaf = optax.tree_utils.tree_get(state.optimizer, name)["dense/kernel"]
            assert leaf.dtype == jnp.float32
            assert float(leaf.min()) == pytest.approx(float(leaf.max()), rel=1e-6)


def test_the_log_says_what_a_device_holds(caplog):
    mesh = make_mesh(1, 8, 1)
    optimizer = make_optimizer(AdamW(moments="bfloat16"), lambda step: RATE)
    state = create_state(start(), MODEL, optimizer, (), mesh, param_dtype=jnp.bfloat16)
    assert bytes_per_device(state.params) == 256 * 256 * 2 / 8
    with caplog.at_level(logging.INFO, logger="mmpo_jax"):
        log_memory(state)
    (line,) = caplog.messages
    assert line == (
        f"each device holds: trained parameters {2**14 / 2**30:.3g} GiB, optimizer "
        f"{(2**15 + 8) / 2**30:.3g} GiB; of a trained parameter 2 bytes and 4 of the optimizer's"
    )


def test_adapters_stay_float32():
    with pytest.raises(ValueError, match="adapters are small, and trained in float32"):
        Training(param_dtype="bfloat16", lora={"rank": 2})
