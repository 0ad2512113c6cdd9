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


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (
            {"type": "soft_overlong", "max_tokens": 40, "buffer": 8},
            r"soft_overlong is 0 up to 32 tokens \(max_tokens less buffer\), and max_new_tokens 32",
        ),
        (
            {"type": "repetition", "ngram_size": 32},
            r"repetition is 0 up to 32 tokens \(ngram_size\), and max_new_tokens 32 lets no sample",
        ),
    ],
)
def test_a_reward_that_tells_no_samples_apart_is_refused(reward, message):
    with pytest.raises(ValidationError, match=message):
        Rollout(rewards=[reward], max_new_tokens=32)
    options = {name: value for name, value in reward.items() if name != "type"}
    longest = Rollout(rewards=[reward], max_new_tokens=33).max_new_tokens
    ids = [1] * longest
    found = [REWARDS[reward["type"]].function(ids[:count], **options) for count in (32, longest)]
    assert found[0] == 0 > found[1]


def test_every_reward_of_tokens_is_tested():
    of_tokens = {name for name, reward in REWARDS.items() if reward.reads == "tokens"}
    assert of_tokens == {"soft_overlong", "length", "repetition"}
