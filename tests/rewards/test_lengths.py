"""Rewards of lengths and repetitions: TRL's where it has them, else figures worked out by hand."""

import numpy as np
import pytest
from pydantic import ValidationError

from mmpo_jax.recipes.rollout import Rollout
from mmpo_jax.rewards import REWARDS
from mmpo_jax.rewards.registry import Question

RNG = np.random.default_rng(0)
SAMPLES = [RNG.integers(4, size=n).tolist() for n in (0, 1, 2, 3, 9, 10, 12, 16, 17, 40)]
QUESTION = Question("1", "What is there?", ())


def values(name, **options):
    found = REWARDS[name].values(QUESTION, [""] * len(SAMPLES), SAMPLES, **options)
    return [value.score for value in found]


@pytest.mark.parity
@pytest.mark.parametrize(("max_tokens", "buffer"), [(16, 6), (16, 16), (9, 1), (50, 5)])
def test_soft_overlong_is_trls(max_tokens, buffer):
    rewards = pytest.importorskip("trl.rewards")
    theirs = rewards.get_soft_overlong_punishment(max_tokens, buffer)(SAMPLES)
    ours = values("soft_overlong", max_tokens=max_tokens, buffer=buffer)
    assert ours == pytest.approx(theirs, abs=1e-12)
    assert max(ours) == 0 and (min(ours) == -1) == (max_tokens < 50)


@pytest.mark.parity
@pytest.mark.parametrize(("ngram_size", "penalty"), [(1, 1.0), (2, 0.5), (3, 1.0)])
def test_repetition_is_trls(ngram_size, penalty):
    rewards = pytest.importorskip("trl.rewards")
    theirs = rewards.get_repetition_penalty_reward(ngram_size, -penalty)(SAMPLES)
    ours = values("repetition", ngram_size=ngram_size, penalty=penalty)
    assert ours == pytest.approx(theirs, abs=1e-12)
    assert min(ours) < 0


def test_length():
    assert values("length", target=10, alpha=0.5) == [
        *(-5.0, -4.5, -4.0, -3.5, -0.5, 0.0),
        *(-1.0, -3.0, -3.5, -15.0),
    ]


def test_a_buffer_that_is_longer_than_the_limit_is_refused():
    reward = {"type": "soft_overlong", "max_tokens": 8, "buffer": 9}
    with pytest.raises(ValidationError, match="buffer 9 is more than max_tokens, 8"):
        Rollout(rewards=[reward])


def test_every_reward_of_tokens_is_tested():
    of_tokens = {name for name, reward in REWARDS.items() if reward.reads == "tokens"}
    assert of_tokens == {"soft_overlong", "length", "repetition"}
