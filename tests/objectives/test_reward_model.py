"""Losses of reward models against their formulas in NumPy; no model has the head yet."""

import dataclasses

import jax
import numpy as np
import pytest
from helpers.numeric import log_sigmoid, loss_of, random_responses, slopes
from pydantic import ValidationError

from mmpo_jax.objectives.reward_model import bradley_terry
from mmpo_jax.recipes.training import Training

RANK = np.array([[1, 2, 2], [3, 1, 2]])
SCORE = np.array([[3.0, 1.0, 1.0], [0.0, 2.0, 1.5]])


def make(seed=0):
    head = np.random.default_rng(seed).standard_normal((2, 3, 5))
    responses = random_responses(2, 3, reference=False, rank=RANK, score=SCORE)
    return dataclasses.replace(responses, statistics={"reward_head": head})


def formula(responses, head, margin, tie_weight, centring):
    """Pair by pair, with the head's value after the last token."""
    terms = []
    for row in range(2):
        reward = [head[row, s, responses.mask[row, s].sum() - 1] for s in range(3)]
        for i in range(3):
            for j in range(3):
                total = centring * (reward[i] + reward[j]) ** 2
                if RANK[row, i] < RANK[row, j]:
                    needed = margin * (SCORE[row, i] - SCORE[row, j])
                    terms.append(-log_sigmoid(reward[i] - reward[j] - needed) + total)
                elif RANK[row, i] == RANK[row, j] and i < j:
                    terms.append(tie_weight * (reward[i] - reward[j]) ** 2 + total)
    return np.mean(terms)


@pytest.mark.parametrize(
    "options",
    [
        {"margin": 0.0, "tie_weight": 1.0, "centring": 0.0},
        {"margin": 0.7, "tie_weight": 0.3, "centring": 0.01},
    ],
)
def test_bradley_terry(options):
    responses = make()
    head = responses.statistics["reward_head"]

    def loss(head):
        changed = dataclasses.replace(responses, statistics={"reward_head": head})
        values, weights = bradley_terry(changed, **options)
        return (values * weights).sum() / weights.sum()

    with jax.enable_x64(True):
        value, _, _ = loss_of("bradley_terry", responses, **options)
        slope = jax.jit(jax.grad(loss))(head)
    assert float(value) == pytest.approx(formula(responses, head, **options), rel=1e-12)
    wanted = slopes(lambda head: formula(responses, head, **options), head)
    np.testing.assert_allclose(slope, wanted, rtol=0, atol=1e-8)


def test_equal_and_extreme_rewards_are_finite():
    responses = make()
    for size in (0.0, 1000.0):
        head = np.full((2, 3, 5), size, np.float32) * np.array([1, -1, 1])[:, None]
        changed = dataclasses.replace(responses, statistics={"reward_head": head})
        assert np.isfinite(loss_of("bradley_terry", changed)[0])
    alone = jax.tree.map(lambda x: x[:, :1], responses)
    assert loss_of("bradley_terry", alone)[0] == 0


def test_critique_is_learned_token_by_token():
    responses = random_responses(2, 3, reference=False)
    critique = responses.mask * (np.arange(5) >= 2)
    responses = dataclasses.replace(responses, fields={"critique": critique.astype(float)})
    with jax.enable_x64(True):
        value = loss_of("critique", responses)[0]
    wanted = -(responses.log_probs * critique).sum() / critique.sum()
    assert float(value) == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("name", ["bradley_terry", "critique"])
def test_refused_before_training(name):
    with pytest.raises(ValidationError, match=rf"{name} needs a model with a head .* none has one"):
        Training(objective={"type": name}, reference={"type": "none"})
