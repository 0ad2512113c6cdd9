"""Losses of reward models against their formulas in NumPy."""

import dataclasses

import jax
import numpy as np
import pytest
from helpers.numeric import log_sigmoid, loss_of, random_responses, slopes
from pydantic import ValidationError

from mmpo_jax.objectives.reward_model import bradley_terry
from mmpo_jax.objectives.sums import mean
from mmpo_jax.recipes.training import Training

RANK = np.array([[1, 2, 2], [3, 1, 2]])
SCORE = np.array([[3.0, 1.0, 1.0], [0.0, 2.0, 1.5]])


def make(seed=0):
    rewards = np.random.default_rng(seed).standard_normal((2, 3))
    responses = random_responses(2, 3, reference=False, rank=RANK, score=SCORE)
    return dataclasses.replace(responses, rewards=rewards)


def formula(rewards, margin, tie_weight, centring):
    """Pair by pair: ordered pairs and ties have a mean each, and centring has that of both."""
    ordered, ties, both = [], [], []
    for row, reward in enumerate(rewards):
        for i in range(3):
            for j in range(3):
                total = (reward[i] + reward[j]) ** 2
                if RANK[row, i] < RANK[row, j]:
                    needed = margin * (SCORE[row, i] - SCORE[row, j])
                    ordered.append(-log_sigmoid(reward[i] - reward[j] - needed))
                    both.append(total)
                elif RANK[row, i] == RANK[row, j] and i < j:
                    ties.append((reward[i] - reward[j]) ** 2)
                    both.append(total)
    return np.mean(ordered) + tie_weight * np.mean(ties) + centring * np.mean(both)


@pytest.mark.parametrize(
    "options",
    [
        {"margin": 0.0, "tie_weight": 1.0, "centring": 0.0},
        {"margin": 0.7, "tie_weight": 0.3, "centring": 0.01},
    ],
)
def test_bradley_terry(options):
    responses = make()

    def loss(rewards):
        values, weights = bradley_terry(dataclasses.replace(responses, rewards=rewards), **options)
        axes = (1, 2, 3)
        return mean((values * weights).sum(axes), weights.sum(axes)).sum()

    with jax.enable_x64(True):
        value, metrics, _ = loss_of("bradley_terry", responses, **options)
        slope = jax.jit(jax.grad(loss))(responses.rewards)
    assert float(value) == pytest.approx(formula(responses.rewards, **options), rel=1e-12)
    wanted = slopes(lambda rewards: formula(rewards, **options), responses.rewards)
    np.testing.assert_allclose(slope, wanted, rtol=0, atol=1e-8)
    margins = [
        responses.rewards[row, i] - responses.rewards[row, j]
        for row, i, j in np.argwhere(RANK[:, :, None] < RANK[:, None, :])
    ]
    assert float(metrics["rewards/margins"]) == pytest.approx(np.mean(margins))
    assert float(metrics["rewards/accuracies"]) == np.mean(np.array(margins) > 0)


def test_all_ties():
    responses = dataclasses.replace(make(), fields={"rank": np.ones((2, 3))})
    differences = [
        (row[i] - row[j]) ** 2 for row in responses.rewards for i, j in ((0, 1), (0, 2), (1, 2))
    ]
    with jax.enable_x64(True):
        value, metrics, _ = loss_of("bradley_terry", responses, centring=0.0)
    assert float(value) == pytest.approx(np.mean(differences), rel=1e-12)
    assert metrics["rewards/margins"] == 0


def test_equal_and_extreme_rewards_are_finite():
    responses = make()
    for size in (0.0, 1000.0):
        rewards = np.full((2, 3), size, np.float32) * np.array([1, -1, 1], np.float32)
        changed = dataclasses.replace(responses, rewards=rewards)
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


def test_policies_and_reward_models_are_not_trained_at_once():
    with pytest.raises(ValidationError, match=r"critique is of reward models and dpo of policies"):
        Training(objective=[{"type": "dpo"}, {"type": "critique"}])
    with pytest.raises(ValidationError, match=r"prompt: it has no \{response\}, which layout one_"):
        Training(objective=[{"type": "critique", "prompt": "{question} ?", "layout": "one_turn"}])
    lists = [{"type": "critique"}, {"type": "critique", "markers": True}]
    with pytest.raises(ValidationError, match="give all critiques of the list the same options"):
        Training(objective=lists)
