"""Rounding of weights on saving, and how much of an update survives it."""

import ml_dtypes
import numpy as np
import pytest

from mmpo_jax.checkpoints.rounding import Survival, round_tensor
from mmpo_jax.models.config import ModelError

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


@pytest.fixture
def weights():
    """(of a bfloat16 checkpoint, the same after an update far below half of its steps)."""
    rng = np.random.default_rng(0)
    before = rng.normal(0, 0.05, (300, 200)).astype(BFLOAT16)
    update = rng.choice([-1e-5, 1e-5], before.shape)
    return before, (before.astype(np.float32) + update).astype(np.float32)


def survived(before, trained, name):
    survival = Survival()
    survival.add(before, trained, round_tensor(trained, name, "w"))
    return survival.share


def test_what_every_dtype_keeps_of_a_small_update(weights):
    assert survived(*weights, "float32") == 1
    assert survived(*weights, "bfloat16") < 0.2
    assert survived(*weights, "bfloat16_stochastic") == pytest.approx(1, abs=0.1)
    before, trained = weights
    direct = round_tensor(trained, "bfloat16", "w").astype(np.float64) - before.astype(np.float64)
    change = trained.astype(np.float64) - before.astype(np.float64)
    expected = (direct * change).sum() / (change**2).sum()
    assert survived(before, trained, "bfloat16") == pytest.approx(expected)


def test_survival_adds_tensors_up_and_leaves_out_what_was_not_trained(weights):
    before, trained = weights
    survival = Survival()
    assert survival.share is None
    survival.add(trained, trained, before)
    assert survival.share is None
    for half in (slice(150), slice(150, None)):
        survival.add(before[half], trained[half], before[half])
        survival.add(before[half], trained[half], trained[half])
    assert survival.share == pytest.approx(0.5)


def test_stochastic_rounding_takes_a_neighbour_and_is_unbiased():
    exact = np.float32([1 + 2**-7 / 4, -(1 + 2**-7 / 4), 1.5, 0, np.inf, -np.inf, np.nan])
    many = np.repeat(exact[None], 4000, axis=0)
    rounded = round_tensor(many, "bfloat16_stochastic", "w").astype(np.float64)
    assert set(rounded[:, 0]) == {1, 1 + 2**-7}
    np.testing.assert_allclose(rounded[:, :2].mean(axis=0), exact[:2], atol=3e-4)
    for column in range(2, len(exact)):
        np.testing.assert_array_equal(rounded[:, column], many[:, column])


def test_stochastic_rounding_is_the_same_every_time_and_another_for_every_tensor(weights):
    first, again, other = (
        round_tensor(weights[1], "bfloat16_stochastic", key) for key in ("a", "a", "b")
    )
    np.testing.assert_array_equal(first, again)
    assert np.any(first != other)


def test_what_is_beyond_the_range_of_a_dtype_is_an_error():
    large = np.float32([[1, 70_000]])
    with pytest.raises(ModelError, match=r"layer\.weight: 70000 is beyond the range of float16"):
        round_tensor(large, "float16", "layer.weight")
    assert np.isinf(round_tensor(np.float32([np.inf]), "float16", "w")).all()
