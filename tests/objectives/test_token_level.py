"""Token-level objectives against formulas of their papers in NumPy float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.token_cases import check_extremes, check_formula, l, loss_of, make_case, to_responses

from mmpo_jax.objectives import terms as objectives
from mmpo_jax.objectives.responses import Responses


def u(y):
    return y.log_probs - y.reference_log_probs


def ddpo(beta, gamma, average):
    def log_prob(y, values):
        corrected = y.changed == 1
        total = values[~corrected].sum() + gamma * values[corrected].sum()
        return total / ((~corrected).sum() + gamma * corrected.sum()) if average else total

    def formula(w, loser, *_):
        r = [log_prob(y, y.log_probs) - log_prob(y, y.reference_log_probs) for y in (w, loser)]
        return l(beta * (r[0] - r[1]))

    return formula


def weighted_dpo(beta, average):
    def formula(w, loser, *_):
        r = [np.dot(y.token_weights, u(y)) for y in (w, loser)]
        if average:
            r = [x / y.token_weights.sum() for x, y in zip(r, (w, loser), strict=True)]
        return l(beta * (r[0] - r[1]))

    return formula


def tdpo1(beta):
    def formula(w, loser, *_):
        delta = beta * loser.kl.sum() - beta * w.kl.sum()
        return l(beta * u(w).sum() - beta * u(loser).sum() - delta)

    return formula


def tdpo2(beta, alpha):
    def formula(w, loser, w_0, _):
        delta = beta * loser.kl.sum() - beta * w_0.kl.sum()
        return l(beta * u(w).sum() - beta * u(loser).sum() - alpha * delta)

    return formula


def sparse_po(beta):
    def formula(w, loser, *_):
        ratio = [beta * (y.token_weights * u(y)).sum() for y in (w, loser)]
        kl = [beta * (y.token_weights * y.kl).sum() for y in (w, loser)]
        return l(ratio[0] - ratio[1] - (kl[1] - kl[0]))

    return formula


def rrpo(beta, alpha):
    def formula(w, loser, *_):
        margin = 0.0
        for phrase in set(w.phrases) & set(loser.phrases) - {0}:
            margin += u(w)[w.phrases == phrase].sum() - u(loser)[loser.phrases == phrase].sum()
        return l(beta * margin) + alpha * w.kl.sum()

    return formula


def jpo(beta):
    """Prompts and responses are one text each."""

    def formula(w, loser, *_):
        joint = [y.log_probs.sum() - y.reference_log_probs.sum() for y in (w, loser)]
        return np.log1p(np.exp(beta * (joint[1] - joint[0])))

    return formula


CASES = {
    "ddpo": (ddpo, {"beta": 0.5, "gamma": 5.0, "average": True}),
    "weighted_dpo": (weighted_dpo, {"beta": 0.2, "average": False}),
    "tdpo1": (tdpo1, {"beta": 0.2}),
    "tdpo2": (tdpo2, {"beta": 0.2, "alpha": 0.5}),
    "sparse_po": (sparse_po, {"beta": 0.2}),
    "rrpo": (rrpo, {"beta": 0.3, "alpha": 0.05}),
    "jpo": (jpo, {"beta": 0.3}),
}


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradient_are_those_of_the_paper(name):
    formula, options = CASES[name]
    check_formula(name, formula(**options), **options)


def test_the_other_way_of_averaging():
    check_formula("ddpo", ddpo(0.1, 1.1, False), beta=0.1, gamma=1.1, average=False)
    check_formula("weighted_dpo", weighted_dpo(0.1, True), average=True)


def test_a_ranking():
    check_formula("rrpo", rrpo(0.1, 0.01), make_case(seed=4, responses=3))


@pytest.mark.parametrize("name", CASES)
def test_extreme_log_probs_stay_finite(name):
    check_extremes(name)


def test_weights_of_one_give_the_plain_form():
    case = make_case() | {"token_weights": np.ones((4, 2, 6)), "changed": np.zeros((4, 2, 6))}
    with jax.enable_x64(True):
        responses = to_responses(case)
        plain = loss_of("dpo", responses, np.ones(4), beta=0.3)
        for name, options in (("weighted_dpo", {}), ("ddpo", {"average": False})):
            value = loss_of(name, responses, np.ones(4), beta=0.3, **options)
            np.testing.assert_allclose(value, plain, rtol=1e-12)
        tdpo = loss_of("tdpo1", responses, np.ones(4), beta=0.3)
        sparse = loss_of("sparse_po", responses, np.ones(4), beta=0.3)
        np.testing.assert_allclose(sparse, tdpo, rtol=1e-12)


class TestNsft:
    """Two means added up: the chosen response's and the corrective dialogue's."""

    def responses(self, dtype=np.float64):
        rng = np.random.default_rng(0)
        turn = np.array([[[0, 0, 0, 1, 1, 2]], [[0, 1, 1, 1, 1, 1]], [[0, 0, 0, 0, 0, 0]]])
        mask = np.ones((3, 1, 6), bool)
        mask[:, :, 3] = False  # a question
        log_probs = -np.abs(rng.standard_normal((3, 1, 6)))
        kl = np.abs(rng.standard_normal((3, 1, 6)))
        made = Responses(
            jnp.asarray(log_probs.astype(dtype)),
            jnp.asarray(mask),
            statistics={"kl": jnp.asarray(kl.astype(dtype))},
            fields={"turn": jnp.asarray(turn.astype(dtype))},
        )
        return made, log_probs, kl, mask, turn

    @pytest.mark.parametrize("kl_weight", [0.0, 0.3])
    def test_value_and_gradient(self, kl_weight):
        with jax.enable_x64(True):
            made, log_probs, kl, mask, turn = self.responses()
            token = -log_probs + kl_weight * kl
            expected = token[mask & (turn == 0)].mean() + token[mask & (turn > 0)].mean()

            def loss(x):
                return loss_of(
                    "nsft", dataclasses.replace(made, log_probs=x), np.ones(3), kl_weight=kl_weight
                )

            value, slopes = jax.value_and_grad(loss)(made.log_probs)
        np.testing.assert_allclose(value, expected, rtol=1e-12)
        first, rest = mask & (turn == 0), mask & (turn > 0)
        np.testing.assert_allclose(slopes, -(first / first.sum() + rest / rest.sum()), rtol=1e-12)

    def test_kl_asks_for_a_reference_that_runs(self):
        assert not objectives.make_term("nsft").needs & {"kl", "reference_model"}
        assert {"kl", "reference_model"} <= objectives.make_term("nsft", kl_weight=0.1).needs

    def test_no_dialogue_at_all(self):
        made, *_ = self.responses(np.float32)
        plain = dataclasses.replace(made, fields={"turn": jnp.zeros((3, 1, 6))})
        value = loss_of("nsft", plain, np.ones(3))
        assert float(value) == pytest.approx(float(loss_of("sft", plain, np.ones(3))), rel=1e-6)


@pytest.mark.parametrize("kl_weight", [0.0, 0.3])
def test_anchored_sft_weighs_tokens_by_their_probability(kl_weight):
    with jax.enable_x64(True):
        made, log_probs, kl, mask, _ = TestNsft().responses()
        token = -np.exp(log_probs) * log_probs + kl_weight * kl

        def loss(x):
            changed = dataclasses.replace(made, log_probs=x)
            return loss_of("anchored_sft", changed, np.ones(3), kl_weight=kl_weight)

        value, slopes = jax.value_and_grad(loss)(made.log_probs)
    np.testing.assert_allclose(value, token[mask].mean(), rtol=1e-12)
    # The probability itself has no gradient.
    np.testing.assert_allclose(slopes, -np.exp(log_probs) * mask / mask.sum(), rtol=1e-12)
