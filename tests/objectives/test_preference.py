"""DPO as the model of all pairwise objectives: its value, metrics, and symmetries."""

import dataclasses

import jax
import numpy as np
import pytest
from helpers.rankings import loss_of, ranked, term_of

from mmpo_jax.objectives.terms import make_term

RANKS = [[1, 2], [2, 1], [1, 2], [2, 1], [1, 2], [1, 2], [2, 1]]


@pytest.fixture(scope="module")
def pairs():
    with jax.enable_x64(True):
        return ranked(RANKS)


def chosen_first(values):
    return np.take_along_axis(np.asarray(values), np.argsort(RANKS, axis=1), axis=1)


@pytest.mark.parametrize("beta", [0.05, 1.0])
def test_metrics_are_those_of_the_pairs(pairs, beta):
    term = term_of("dpo", beta=beta)
    with jax.enable_x64(True):
        sums, state = term.objective.apply(pairs, np.ones(7), {}, term.options)
        metrics = {name: float(total / weight) for name, (total, weight) in sums.metrics.items()}
        policy, reference = chosen_first(pairs.total), chosen_first(pairs.reference)
    rewards = beta * (policy - reference)
    assert state == {}
    assert float(sums.weight) == 7
    assert metrics == pytest.approx(
        {
            "rewards/chosen": rewards[:, 0].mean(),
            "rewards/rejected": rewards[:, 1].mean(),
            "rewards/accuracies": (rewards[:, 0] > rewards[:, 1]).mean(),
            "rewards/margins": (rewards[:, 0] - rewards[:, 1]).mean(),
            "logps/chosen": policy[:, 0].mean(),
            "logps/rejected": policy[:, 1].mean(),
        },
        rel=1e-9,
    )


@pytest.mark.parametrize("name", ["dpo", "mmpo", "cream", "aot", "sigmoid_norm", "rpo"])
def test_policy_equal_to_reference_gives_ln_2(pairs, name):
    options = {"sft_weight": 0.0} if name == "rpo" else {}
    with jax.enable_x64(True):
        same = dataclasses.replace(
            pairs, reference=pairs.total, reference_log_probs=pairs.log_probs
        )
        assert float(loss_of(term_of(name, **options), same)) == pytest.approx(np.log(2), abs=1e-7)
        sums, _ = (term := term_of("dpo")).objective.apply(same, np.ones(7), {}, term.options)
    assert float(sums.metrics["rewards/margins"][0]) == 0
    assert float(sums.metrics["rewards/accuracies"][0]) == 0  # a tie is not won


def test_swapping_ranks_swaps_the_margin(pairs):
    rank = 3 - np.asarray(pairs.fields["rank"])
    swapped = dataclasses.replace(pairs, fields=pairs.fields | {"rank": rank})
    term = term_of("dpo", beta=1.0)
    margins = []
    with jax.enable_x64(True):
        for responses in (pairs, swapped):
            sums, _ = term.objective.apply(responses, np.ones(7), {}, term.options)
            margins.append(float(sums.metrics["rewards/margins"][0]))
        half = [loss_of(term_of("dpo", label_smoothing=0.5), x) for x in (pairs, swapped)]
    assert margins[0] == pytest.approx(-margins[1])
    assert abs(margins[0]) > 0.1
    np.testing.assert_allclose(*half, rtol=1e-9)


def test_modpo_has_to_be_told_its_dimensions():
    with pytest.raises(TypeError, match="modpo needs the option 'dimensions'"):
        make_term("modpo")
    assert {"scores/safe", "scores/short"} <= term_of("modpo").needs
