"""Plackett-Luce DPO against the likelihood of the ranking, written out place by place."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest
from helpers.numeric import (
    check_extremes,
    gradient_of,
    loss_of,
    random_responses,
    slopes,
)

RANKS = np.array([[1, 2, 3, 4], [4, 2, 1, 3], [3, 1, 4, 2]])


def ranking_loss(rewards, ranks):
    """-log of the probability to draw the responses in the order of their ranks."""
    order = np.argsort(ranks)
    values, loss = rewards[order], 0.0
    for place in range(len(values)):
        rest = np.exp(values[place:])
        loss -= np.log(rest[0] / rest.sum())
    return loss


def expected(responses, log_probs, beta):
    ratio = (log_probs * responses.mask).sum(-1) - responses.reference
    ranks = responses.fields["rank"]
    return np.mean([ranking_loss(beta * r, k) for r, k in zip(ratio, ranks, strict=True)])


@pytest.mark.parametrize("beta", [0.1, 0.7])
def test_rankings_without_ties(beta):
    with jax.enable_x64(True):
        responses = random_responses(3, 4, rank=RANKS)
        value, metrics, _ = loss_of("plackett_luce", responses, beta=beta)
        slope = gradient_of("plackett_luce", responses, beta=beta)
    assert float(value) == pytest.approx(expected(responses, responses.log_probs, beta), rel=1e-12)
    wanted = slopes(lambda point: expected(responses, point, beta), responses.log_probs)
    np.testing.assert_allclose(slope, wanted, rtol=0, atol=1e-8)
    assert 0 < float(metrics["rewards/accuracies"]) < 1


def test_probabilities_of_all_orders_add_up_to_one():
    with jax.enable_x64(True):
        total = 0.0
        for order in itertools.permutations(range(4)):
            responses = random_responses(1, 4, rank=[order])
            total += np.exp(-float(loss_of("plackett_luce", responses, beta=1.0)[0]))
    assert total == pytest.approx(1, rel=1e-12)


def test_two_responses_are_dpo():
    with jax.enable_x64(True):
        responses = random_responses(5, 2, rank=[[1, 2], [2, 1], [1, 2], [2, 1], [1, 1]])
        ours, theirs = (loss_of(name, responses, beta=0.3) for name in ("plackett_luce", "dpo"))
    assert float(ours[0]) == pytest.approx(float(theirs[0]), rel=1e-12)
    for key, metric in theirs[1].items():
        assert float(ours[1][key]) == pytest.approx(float(metric), rel=1e-12), key


def test_tied_responses_do_not_compete():
    """Two first places and a last one: each of the first against the last alone."""
    with jax.enable_x64(True):
        responses = random_responses(1, 3, rank=[[1, 2, 1]])
        value = loss_of("plackett_luce", responses, beta=0.5)[0]
    first, last, also = 0.5 * (responses.log_probs.sum(-1) - responses.reference)[0]
    wanted = np.log1p(np.exp(last - first)) + np.log1p(np.exp(last - also))
    assert float(value) == pytest.approx(wanted, rel=1e-12)


def test_missing_responses_and_filling_rows_count_nothing():
    with jax.enable_x64(True):
        whole = random_responses(2, 3, rank=[[1, 2, 3], [2, 3, 1]])
        mask = whole.mask.copy()
        mask[0, 1] = False
        gone = dataclasses.replace(whole, mask=mask)
        kept = jax.tree.map(lambda x: x[:1, [0, 2]], whole)
        value = loss_of("plackett_luce", gone, weights=[1.0, 0.0])[0]
        wanted = loss_of("plackett_luce", kept)[0]
    assert float(value) == pytest.approx(float(wanted), rel=1e-12)


@pytest.mark.parametrize("ranks", [[[1]], [[2, 2, 2]], [[1, 2, 3, 3]]])
def test_finite(ranks):
    def make():
        return random_responses(1, len(ranks[0]), rank=ranks)

    check_extremes("plackett_luce", make)
    if len(set(ranks[0])) == 1:
        assert loss_of("plackett_luce", make())[0] == 0
        assert not gradient_of("plackett_luce", make()).any()
