"""Objectives with another image against formulas of their papers in NumPy float64."""

import numpy as np
import pytest
from helpers.token_cases import check_extremes, check_formula, l, make_case, sigmoid


def r(y):
    return y.log_probs.sum() - y.reference_log_probs.sum()


def r_m(y):
    return y.log_probs_m.sum() - y.reference_log_probs_m.sum()


def mdpo(beta, delta):
    def formula(w, loser, *_):
        return l(beta * (r(w) - r(loser))) + l(beta * (r(w) - r_m(w))) + l(beta * r(w) - delta)

    return formula


def re_align(beta):
    def formula(w, loser, *_):
        return l(beta * (r(w) - r(loser))) + l(beta * (r(w) - r_m(w)))

    return formula


def weights(y, gamma):
    return np.where(y.changed == 1, gamma, 1.0)


def weighted(y, gamma, suffix=""):
    ratios = getattr(y, "log_probs" + suffix) - getattr(y, "reference_log_probs" + suffix)
    return (weights(y, gamma) * ratios).sum()


def chip(beta, segments, tokens, gamma):
    def formula(w, loser, w_0, _):
        mean = [weighted(y, gamma) / weights(y, gamma).sum() for y in (w, loser)]
        visual, whole = l(beta * (r(w) - r_m(w))), l(beta * (r(w) - r(loser)))
        token = l(beta * w_0.kl.sum() - beta * loser.kl.sum())
        return visual + whole + segments * l(beta * (mean[0] - mean[1])) + tokens * token

    return formula


def chip_code(beta, tokens, gamma):
    def formula(w, loser, w_0, _):
        margin = weighted(w, gamma) - weighted(loser, gamma)
        margin += weighted(w, gamma) - weighted(w, gamma, "_m")
        return l(beta * (margin - tokens * (loser.kl.sum() - w_0.kl.sum())))

    return formula


def vdpo(beta, gamma):
    def formula(w, loser, w_0, loser_0):
        f = [
            gamma * y.log_probs.sum()
            - (gamma - 1) * y_0.log_probs_m.sum()
            - y.reference_log_probs.sum()
            for y, y_0 in ((w, w_0), (loser, loser_0))
        ]
        return l(beta * (f[0] - f[1]))

    return formula


def povid(beta):
    def formula(w, loser, *_):
        own = w.own.sum() - w.reference_own.sum()
        return 0.5 * l(beta * (r(w) - r(loser))) + 0.5 * l(beta * (r(w) - own))

    return formula


def tpo_visual(beta):
    def formula(w, loser, *_):
        def anchored(y, prefix, c):
            s = getattr(y, prefix + "logit") - getattr(y, prefix + "logit_m")
            return (getattr(y, prefix + "log_probs") + np.log(c(s))).sum()

        def ratio(y, c):
            return anchored(y, "", c) - anchored(y, "reference_", c)

        chosen = ratio(w, lambda s: sigmoid(s) + 0.5)
        return l(beta * (chosen - ratio(loser, lambda s: 1.5 - sigmoid(s))))

    return formula


CASES = {
    "mdpo": (mdpo, {"beta": 0.3, "delta": 0.2}),
    "re_align": (re_align, {"beta": 0.3}),
    "chip": (chip, {"beta": 0.5, "segments": 0.4, "tokens": 0.2, "gamma": 4.0}),
    "chip_code": (chip_code, {"beta": 0.3, "tokens": 0.2, "gamma": 2.0}),
    "vdpo": (vdpo, {"beta": 0.3, "gamma": 0.75}),
    "povid": (povid, {"beta": 0.3}),
    "tpo_visual": (tpo_visual, {"beta": 0.3}),
}


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradient_are_those_of_the_paper(name):
    formula, options = CASES[name]
    check_formula(name, formula(**options), **options)


@pytest.mark.parametrize("name", ["mdpo", "chip"])
def test_all_pairs_of_a_ranking(name):
    formula, options = CASES[name]
    check_formula(name, formula(**options), make_case(seed=3, responses=4), **options)


@pytest.mark.parametrize("name", CASES)
def test_extreme_log_probs_stay_finite(name):
    check_extremes(name)


def test_the_published_defaults():
    """Those of the papers, so that a recipe without options is the method."""
    check_formula("mdpo", mdpo(0.1, 0.0))
    check_formula("chip", chip(0.5, 1 / 3, 0.1, 4.0))
    check_formula("vdpo", vdpo(0.1, 0.75))
