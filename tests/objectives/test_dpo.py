"""DPO and SFT against formulas written out in NumPy float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmpo_jax.objectives.dpo import dpo
from mmpo_jax.objectives.sft import sft
from mmpo_jax.objectives.sums import mean, weighted


def log_sigmoid(x):
    return -np.logaddexp(0, -x)


def numpy_dpo(policy, reference, beta, smoothing):
    """(losses, rewards) of every pair, one pair at a time."""
    losses, rewards = [], []
    for (chosen, rejected), (chosen_0, rejected_0) in zip(policy, reference, strict=True):
        margin = beta * ((chosen - chosen_0) - (rejected - rejected_0))
        losses.append(-(1 - smoothing) * log_sigmoid(margin) - smoothing * log_sigmoid(-margin))
        rewards.append((beta * (chosen - chosen_0), beta * (rejected - rejected_0)))
    return np.array(losses), np.array(rewards)


@pytest.fixture
def pairs():
    rng = np.random.default_rng(0)
    return tuple(-20 + 8 * rng.standard_normal((7, 2)) for _ in range(2))


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.49])
@pytest.mark.parametrize("beta", [0.05, 0.1, 1.0])
def test_loss_and_metrics(pairs, beta, smoothing):
    policy, reference = pairs
    losses, rewards = numpy_dpo(policy, reference, beta, smoothing)
    with jax.enable_x64(True):
        sums = dpo(policy, reference, np.ones(7), beta=beta, label_smoothing=smoothing)
        value = float(mean(sums.loss, sums.weight))
        metrics = {name: float(mean(*pair)) for name, pair in sums.metrics.items()}
    assert value == pytest.approx(losses.mean(), rel=1e-12)
    assert metrics == pytest.approx(
        {
            "rewards/chosen": rewards[:, 0].mean(),
            "rewards/rejected": rewards[:, 1].mean(),
            "rewards/accuracies": (rewards[:, 0] > rewards[:, 1]).mean(),
            "rewards/margins": (rewards[:, 0] - rewards[:, 1]).mean(),
            "logps/chosen": policy[:, 0].mean(),
            "logps/rejected": policy[:, 1].mean(),
        },
        rel=1e-12,
    )


def test_gradient_is_that_of_the_formula(pairs):
    policy, reference = pairs
    beta, smoothing = 0.3, 0.1

    def total(policy):
        return dpo(policy, reference, np.ones(7), beta=beta, label_smoothing=smoothing).loss

    with jax.enable_x64(True):
        gradient = jax.grad(total)(jnp.asarray(policy))
    margin = beta * ((policy - reference)[:, 0] - (policy - reference)[:, 1])
    # d loss / d margin = sigmoid(margin) - (1 - e)
    slope = beta * (1 / (1 + np.exp(-margin)) - (1 - smoothing))
    np.testing.assert_allclose(gradient, np.stack([slope, -slope], axis=1), rtol=1e-12)


def test_rows_of_weight_0_do_not_count(pairs):
    policy, reference = (np.float32(part) for part in pairs)
    weights = np.float32([1, 0, 1, 1, 0, 1, 0])
    part = weights == 1
    expected = dpo(policy[part], reference[part], weights[part], beta=0.1)
    policy = np.where(part[:, None], policy, 55)
    actual = dpo(policy, reference, weights, beta=0.1)
    assert float(actual.weight) == 4
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_policy_equal_to_reference_gives_ln_2(pairs):
    policy = np.float32(pairs[0])
    for smoothing in (0.0, 0.3):
        sums = dpo(policy, policy, np.ones(7, np.float32), beta=0.1, label_smoothing=smoothing)
        assert float(sums.loss / sums.weight) == pytest.approx(np.log(2), abs=1e-7)
        assert float(sums.metrics["rewards/margins"][0]) == 0
        assert float(sums.metrics["rewards/accuracies"][0]) == 0  # a tie is not won


def test_swapping_a_pair_swaps_its_loss_and_smoothing_half_is_symmetric(pairs):
    policy, reference = (np.float32(part) for part in pairs)
    weights = np.ones(7, np.float32)
    plain = dpo(policy, reference, weights, beta=1.0)
    swapped = dpo(policy[:, ::-1], reference[:, ::-1], weights, beta=1.0)
    assert float(plain.metrics["rewards/margins"][0]) == pytest.approx(
        -float(swapped.metrics["rewards/margins"][0])
    )
    assert not np.isclose(plain.loss, swapped.loss)
    half = {"beta": 1.0, "label_smoothing": 0.5}
    np.testing.assert_allclose(
        dpo(policy, reference, weights, **half).loss,
        dpo(policy[:, ::-1], reference[:, ::-1], weights, **half).loss,
        rtol=1e-6,
    )


@pytest.mark.parametrize("chosen", [-1000.0, 1000.0])
def test_extreme_log_probs_stay_finite(chosen):
    policy = jnp.float32([[chosen, -chosen]])
    reference, weights = jnp.zeros((1, 2)), jnp.ones(1)

    def total(policy):
        return dpo(policy, reference, weights, beta=1.0, label_smoothing=0.1).loss

    value, gradient = jax.value_and_grad(total)(policy)
    expected, _ = numpy_dpo(np.array(policy), np.zeros((1, 2)), 1.0, 0.1)
    assert float(value) == pytest.approx(expected[0], rel=1e-6)
    assert np.all(np.isfinite(gradient))


def test_sft_is_the_mean_over_counted_tokens():
    rng = np.random.default_rng(0)
    log_probs = -np.abs(rng.standard_normal((4, 2, 5))).astype(np.float32)
    mask = rng.random((4, 2, 5)) < 0.6
    weights = np.float32([1, 1, 0, 1])
    sums = sft(jnp.asarray(log_probs), jnp.asarray(mask), jnp.asarray(weights))
    counted = [
        -log_probs[i, j, k]
        for i, j, k in np.ndindex(log_probs.shape)
        if mask[i, j, k] and weights[i]
    ]
    assert float(sums.weight) == len(counted)
    assert float(mean(sums.loss, sums.weight)) == pytest.approx(np.mean(counted), rel=1e-6)
    assert float(mean(*sums.metrics["nll_loss"])) == pytest.approx(np.mean(counted), rel=1e-6)


def test_mean_of_nothing_is_0_and_has_a_gradient():
    assert float(mean(jnp.float32(3), jnp.float32(0))) == 0
    assert float(jax.grad(lambda x: mean(x, jnp.float32(0)))(jnp.float32(3))) == 0
    total, weight = weighted(jnp.float32([2, 4]), jnp.float32([1, 0.5]))
    assert (float(total), float(weight)) == (4, 1.5)
