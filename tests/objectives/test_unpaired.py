"""KTO, BCO and the other objectives of single responses against their formulas in NumPy."""

import dataclasses

import jax
import numpy as np
import pytest
from helpers.numeric import (
    check_extremes,
    gradient_of,
    log_sigmoid,
    loss_of,
    random_responses,
    sigmoid,
    slopes,
)

DESIRABLE = np.array([[1, 0], [0, 0], [1, 1]])
WEIGHTED = {"desirable_weight": 1.3, "undesirable_weight": 0.6}


def make(seed=0, desirable=DESIRABLE, **fields):
    """Three prompts with two responses each, and as many of the record before."""
    n, s = np.shape(desirable)
    return dataclasses.replace(
        random_responses(n, s, seed=seed, desirable=desirable, **fields),
        views={"mismatched": random_responses(n, s, seed=seed + 1)},
    )


def ratios(responses, log_probs=None):
    log_probs = responses.log_probs if log_probs is None else log_probs
    return (log_probs * responses.mask).sum(-1) - responses.reference


def kto(responses, log_probs, beta, kl):
    ratio = ratios(responses, log_probs)
    good = 1.3 * (1 - sigmoid(beta * (ratio - kl)))
    bad = 0.6 * (1 - sigmoid(beta * (kl - ratio)))
    return np.where(DESIRABLE, good, bad).mean()


def apo(responses, log_probs, beta):
    value = sigmoid(beta * ratios(responses, log_probs))
    return np.where(DESIRABLE, 1.3 * (1 - value), 0.6 * value).mean()


def bco(responses, log_probs, beta, shift=None):
    reward = beta * ratios(responses, log_probs)
    shift = reward.mean() if shift is None else shift
    loss = np.where(DESIRABLE, -log_sigmoid(reward - shift), -log_sigmoid(shift - reward))
    return loss.mean()


def check(name, formula, responses, **options):
    with jax.enable_x64(True):
        value = float(loss_of(name, responses, **options)[0])
        slope = gradient_of(name, responses, **options)
    assert value == pytest.approx(formula(responses.log_probs), rel=1e-12)
    np.testing.assert_allclose(slope, slopes(formula, responses.log_probs), rtol=0, atol=1e-8)


@pytest.mark.parametrize("seed", [0, 3])
def test_kto(seed):
    """With an estimate of the KL divergence on either side of 0; it has no gradient."""
    responses = make(seed)
    mean = ratios(responses.views["mismatched"]).mean()
    assert (mean > 0) == (seed == 0)
    kl = max(0, mean)
    check("kto", lambda x: kto(responses, x, 0.3, kl), responses, beta=0.3, **WEIGHTED)
    with jax.enable_x64(True):
        metrics = loss_of("kto", responses, beta=0.3)[1]
    assert float(metrics["kl"]) == pytest.approx(kl, abs=1e-12)
    rewards = 0.3 * ratios(responses)
    assert float(metrics["rewards/chosen"]) == pytest.approx(rewards[DESIRABLE == 1].mean())
    assert float(metrics["rewards/rejected"]) == pytest.approx(rewards[DESIRABLE == 0].mean())


def test_apo_zero():
    responses = make()
    check("apo_zero_unpaired", lambda x: apo(responses, x, 0.3), responses, beta=0.3, **WEIGHTED)


def test_bco_has_no_gradient_through_its_shift():
    responses = make()
    shift = 0.4 * ratios(responses).mean()
    check("bco", lambda x: bco(responses, x, 0.4, shift), responses, beta=0.4)


def test_bco_shifts_by_the_mean_of_all_batches():
    batches, state, seen = [make(seed) for seed in (0, 5, 9)], None, []
    with jax.enable_x64(True):
        for batch in batches:
            value, _, state = loss_of("bco", batch, state=state, beta=0.4)
            seen.append(0.4 * ratios(batch))
            wanted = bco(batch, batch.log_probs, 0.4, np.mean(seen))
            assert float(value) == pytest.approx(wanted, rel=1e-12)
        assert float(state["seen"]) == 18
        kept = loss_of("bco", batches[0], weights=[0.0, 0.0, 0.0], state=state)[2]
    assert float(kept["shift"]) == float(state["shift"])


def test_poft():
    others = -np.random.default_rng(4).random((3, 2))
    responses = random_responses(3, 2, reference=False, other_models=others)
    length = responses.mask.sum(-1)
    check(
        "poft",
        lambda x: -log_sigmoid((x * responses.mask).sum(-1) / length - others).mean(),
        responses,
    )


@pytest.mark.parametrize(
    ("name", "fields", "learned", "options"),
    [
        ("rejection_sampling", {"score": [[1, 3], [2, 2], [-5, -4]]}, [[0, 1], [1, 1], [0, 1]], {}),
        (
            "rejection_sampling",
            {"score": [[1, 3], [2, 2], [-5, -4]]},
            [[0, 1], [1, 1], [0, 0]],
            {"min_score": 0.0},
        ),
        ("verified_sft", {"desirable": [[1, 0], [0, 0], [1, 1]]}, [[1, 0], [0, 0], [1, 1]], {}),
    ],
)
def test_only_good_samples_are_learned(name, fields, learned, options):
    responses = random_responses(3, 2, reference=False, **fields)
    counted = responses.mask * np.array(learned)[..., None]
    check(name, lambda x: -(x * counted).sum() / counted.sum(), responses, **options)


@pytest.mark.parametrize("name", ["kto", "bco", "apo_zero_unpaired"])
def test_finite(name):
    check_extremes(name, make)
    check_extremes(name, lambda: make(desirable=[[1]]))
    check_extremes(name, lambda: make(desirable=[[0]]))


@pytest.mark.parametrize("name", ["kto", "bco"])
def test_nothing_counts(name):
    """Rows that only fill a batch, and responses that are missing."""
    responses = make()
    empty = dataclasses.replace(
        responses,
        mask=np.zeros_like(responses.mask),
        views={"mismatched": dataclasses.replace(responses, mask=np.zeros_like(responses.mask))},
    )
    for value in (loss_of(name, empty)[0], loss_of(name, responses, weights=np.zeros(3))[0]):
        assert value == 0
    with jax.enable_x64(True):
        weighted = loss_of(name, responses, weights=[1.0, 0.0, 1.0])[0]
        alone = loss_of(name, jax.tree.map(lambda x: x[[0, 2]], responses))[0]
    assert float(weighted) == pytest.approx(float(alone), rel=1e-12)
