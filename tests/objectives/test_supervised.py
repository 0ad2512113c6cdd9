"""SFT, and sums with their weights."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.rankings import loss_of, ranked

from mmpo_jax.objectives.sums import mean, weighted
from mmpo_jax.objectives.terms import first_state, loss_sums, make_term, metrics_of, weighted_loss
from mmpo_jax.training.metrics import means

RANKS = [[1, 2, 3], [2, 1, 1], [1, 2, 3], [3, 3, 0]]
WEIGHTS = np.array([1.0, 1.0, 0.0, 1.0])


@pytest.fixture(scope="module")
def responses():
    with jax.enable_x64(True):
        return ranked(RANKS)


def expected_nll(responses, counts):
    log_probs, mask = np.asarray(responses.log_probs), np.asarray(responses.mask)
    tokens = [
        -log_probs[place]
        for place in np.ndindex(mask.shape)
        if mask[place] and WEIGHTS[place[0]] and counts(place[0], place[1])
    ]
    return np.mean(tokens), len(tokens)


def test_sft_is_the_mean_over_the_tokens_of_all_responses(responses):
    told = ("rank", "desirable")
    fields = {name: x for name, x in responses.fields.items() if name not in told}
    expected, count = expected_nll(responses, lambda row, place: True)
    with jax.enable_x64(True):
        (sums,), _ = loss_sums(
            [make_term("sft")], dataclasses.replace(responses, fields=fields), WEIGHTS, {}
        )
        assert float(mean(sums.loss, sums.weight)) == pytest.approx(expected, rel=1e-9)
        assert float(mean(*sums.metrics["nll_loss"])) == pytest.approx(expected, rel=1e-9)
    assert float(sums.weight) == count


def test_sft_of_a_ranking_learns_the_best(responses):
    best = {0: (0,), 1: (1, 2), 3: (0, 1)}
    expected, _ = expected_nll(responses, lambda row, place: place in best[row])
    with jax.enable_x64(True):
        value = float(loss_of(make_term("sft"), responses, WEIGHTS))
    assert value == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("name", ["sft", "nsft", "anchored_sft"])
def test_what_is_undesirable_is_never_learned(responses, name):
    """Beside an objective of verdicts rows are not ranked, and such responses stay in them."""
    desirable = np.float64([[1, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0]])
    fields = {key: x for key, x in responses.fields.items() if key != "rank"}
    told = dataclasses.replace(responses, fields=fields | {"desirable": desirable})
    with jax.enable_x64(True):
        term = make_term(name)

        def value(log_probs):
            changed = dataclasses.replace(told, log_probs=log_probs)
            return weighted_loss([term], loss_sums([term], changed, WEIGHTS, {})[0])

        gradient = np.asarray(jax.grad(value)(told.log_probs))
    learned = np.abs(gradient).sum(axis=-1) > 0
    np.testing.assert_array_equal(learned, (desirable * WEIGHTS[:, None] * told.present) > 0)


def test_a_list_adds_up_weighted_means(responses):
    terms = [make_term("dpo", 0.8), make_term("bco_pair", 0.2), make_term("sft", 1.5)]
    with jax.enable_x64(True):
        sums, state = loss_sums(terms, responses, WEIGHTS, first_state(terms))
        alone = [float(loss_of(term, responses, WEIGHTS)) for term in terms]
        metrics = means([metrics_of(terms, sums)])
        value = float(weighted_loss(terms, sums))
    assert state == {}
    assert value == pytest.approx(0.8 * alone[0] + 0.2 * alone[1] + 1.5 * alone[2], rel=1e-6)
    for term, expected in zip(terms, alone, strict=True):
        assert metrics[f"loss/{term.objective.name}"] == pytest.approx(expected, rel=1e-6)


def test_losses_of_one_name_are_numbered(responses):
    terms = [make_term("dpo", beta=0.1), make_term("sft"), make_term("dpo", beta=0.5)]
    with jax.enable_x64(True):
        sums, _ = loss_sums(terms, responses, WEIGHTS, {})
        metrics = means([metrics_of(terms, sums)])
        alone = [float(loss_of(term, responses, WEIGHTS)) for term in terms]
    found = [metrics[f"loss/{name}"] for name in ("dpo", "sft", "dpo_2")]
    assert found == pytest.approx(alone, rel=1e-6)
    assert alone[0] != pytest.approx(alone[2], rel=1e-3)


def test_mean_of_nothing_is_0_and_has_a_gradient():
    assert float(mean(jnp.float32(3), jnp.float32(0))) == 0
    assert float(jax.grad(lambda x: mean(x, jnp.float32(0)))(jnp.float32(3))) == 0
    total, weight = weighted(jnp.float32([2, 4]), jnp.float32([1, 0.5]))
    assert (float(total), float(weight)) == (4, 1.5)
