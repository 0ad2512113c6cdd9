"""Divergences of a teacher against formulas in NumPy float64."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest
from helpers.numeric import loss_of, random_responses, slopes

from mmpo_jax.objectives.distillation import token_divergence
from mmpo_jax.objectives.registry import Divergence

V = 7


def log_softmax(x):
    return x - np.logaddexp.reduce(x, axis=-1, keepdims=True)


def kl(p, q):
    """Of probabilities; 0 log 0 is 0."""
    return np.where(p > 0, p * (np.log(np.where(p > 0, p, 1)) - np.log(q)), 0).sum(-1)


def formula(logits, teacher, beta, top_k=None):
    """b KL(t || m) + (1 - b) KL(s || m), the tokens behind the teacher's k first ones as one."""
    s, t = np.exp(log_softmax(logits)), np.exp(log_softmax(teacher))
    if top_k is not None:
        order = np.argsort(-t, axis=-1)
        s, t = (np.take_along_axis(x, order, axis=-1) for x in (s, t))
        s, t = (
            np.concatenate([x[..., :top_k], x[..., top_k:].sum(-1, keepdims=True)], -1)
            for x in (s, t)
        )
        if top_k >= V:
            s, t = s[..., :V], t[..., :V]
    if beta in (0, 1):
        return kl(t, s) if beta == 0 else kl(s, t)
    m = beta * t + (1 - beta) * s
    return beta * kl(t, m) + (1 - beta) * kl(s, m)


@pytest.fixture
def both():
    rng = np.random.default_rng(0)
    return 2 * rng.standard_normal((3, 4, V)), 2 * rng.standard_normal((3, 4, V))


@pytest.mark.parametrize("top_k", [None, 1, 3, V - 1, V, 2 * V])
@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 1.0])
def test_divergences(both, beta, top_k):
    logits, teacher = both

    def ours(logits):
        student, of_teacher = jax.nn.log_softmax(logits), jax.nn.log_softmax(teacher)
        return token_divergence(student, of_teacher, Divergence(beta, top_k)).sum()

    with jax.enable_x64(True):
        value, slope = jax.value_and_grad(ours)(logits)
    assert float(value) == pytest.approx(formula(*both, beta, top_k).sum(), rel=1e-12)
    wanted = slopes(lambda x: formula(x, teacher, beta, top_k).sum(), logits)
    np.testing.assert_allclose(slope, wanted, rtol=0, atol=1e-7)


@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
def test_fewer_tokens_are_never_further_apart(both, beta):
    with jax.enable_x64(True):
        logs = [jax.nn.log_softmax(x) for x in both]
        found = [np.asarray(token_divergence(*logs, Divergence(beta, k))) for k in (1, 2, 4, None)]
        same = token_divergence(logs[0], logs[0], Divergence(beta, 2))
    assert all((fewer <= more + 1e-12).all() for fewer, more in itertools.pairwise(found))
    assert (found[-1] > 0).all()
    np.testing.assert_allclose(same, 0, atol=1e-12)


@pytest.mark.parametrize("top_k", [None, 2])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_sure_distributions_are_finite(beta, top_k):
    """In float32, with all of the probability on one token or another."""
    sure = 1000.0 * np.eye(V, dtype=np.float32)
    for teacher in (sure, np.roll(sure, 1, axis=1)):

        def value(x, teacher=teacher):
            logs = jax.nn.log_softmax(x), jax.nn.log_softmax(teacher)
            return token_divergence(*logs, Divergence(beta, top_k)).sum()

        found, slope = jax.value_and_grad(value)(sure)
        assert np.isfinite(found) and np.isfinite(slope).all()


def test_the_loss_is_the_mean_over_tokens():
    responses = random_responses(2, 3)
    apart = np.random.default_rng(1).random(responses.mask.shape)
    taught = dataclasses.replace(responses, statistics={"divergence": apart})
    with jax.enable_x64(True):
        loss, metrics, _ = loss_of("distillation", taught, beta=0.5)
    wanted = apart[responses.mask].mean()
    assert float(loss) == pytest.approx(wanted, rel=1e-12)
    assert float(metrics["divergence"]) == pytest.approx(wanted)
