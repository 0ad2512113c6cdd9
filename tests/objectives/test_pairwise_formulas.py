"""Every pairwise objective against its paper's formula in NumPy, and finite differences."""

import dataclasses

import jax
import numpy as np
import pytest
from helpers.formulas import BATCHES, PAIRS, One, log_sigmoid
from helpers.rankings import DIMENSIONS, ranked, term_of, value_and_gradient

from mmpo_jax.objectives.responses import Responses

RANKS = [[1, 2, 2, 3, 4], [2, 1, 0, 0, 0], [1, 2, 3, 3, 1], [1, 1, 0, 0, 0], [3, 1, 2, 0, 0]]
"""Rankings with ties, rows of two and of three, and one without a pair; 0 is no response."""
WEIGHTS = [1.0, 1.0, 0.0, 1.0, 1.0]
STEP = 1e-5

CASES = [
    *[(name, {}) for name in [*PAIRS, *BATCHES] if name != "modpo"],
    ("dpo", {"beta": 0.5, "label_smoothing": 0.2}),
    ("sigmoid_norm", {"beta": 5.0}),
    ("robust", {"beta": 0.7, "label_smoothing": 0.3}),
    ("hinge", {"beta": 2.0}),
    ("slic", {"delta": 3.0, "sft_weight": 0.4}),
    ("ipo", {"beta": 0.3}),
    ("ipo", {"beta": 0.3, "length_average": False}),
    ("exo_pair", {"beta": 0.5, "label_smoothing": 0.05}),
    ("discopop", {"beta": 0.5, "tau": 2.0}),
    ("dpop", {"beta": 0.5, "penalty": 2.0}),
    ("r_dpo", {"beta": 0.5, "alpha": 0.2}),
    ("rpo", {"beta": 0.5, "sft_weight": 0.3}),
    ("sppo_hard", {"beta": 0.5}),
    ("sppo", {"beta": 0.2}),
    ("cal_dpo", {"beta": 0.3}),
    ("simpo", {"beta": 3.0, "gamma": 0.2}),
    ("cpo", {"beta": 0.3, "sft_weight": 0.0}),
    ("orpo", {"beta": 0.5}),
    ("asft", {"beta": 0.5}),
    ("alphapo", {"beta": 1.0, "gamma": 0.4, "alpha": -0.5}),
    ("alphapo", {"alpha": 0.0}),
    ("mm_dpo", {"beta": 0.4, "w": 2.0, "k": 1.5}),
    ("odpo", {"beta": 0.4, "alpha": 0.3}),
    ("odpo", {"beta": 0.4, "offset": "identity"}),
    ("mmpo", {"beta": 0.5, "tau": 0.7}),
    ("cream", {"beta": 0.7}),
    ("modpo", {"beta": 0.4, "dimensions": DIMENSIONS}),
    ("modpo", {"dimensions": {"short": 0.9}}),
    ("uni_dpo", {"sft_weight": 0.5, "tau_good": 0.0}),
    ("uni_dpo", {"beta": 0.5, "eta": 0.1, "gamma": 0.0, "tau_ref": 0.0}),
    ("aot", {"beta": 0.6, "label_smoothing": 0.2}),
    ("aot_unpaired", {"beta": 0.6, "label_smoothing": 0.2}),
    ("beta_dpo", {"beta": 0.5, "alpha": 0.3, "drop": 0.5, "momentum": 0.2}),
    ("beta_dpo", {"drop": 1.0}),
    ("mm_dpo_batch", {"beta": 0.5, "w": 2.0, "drop": 0.6}),
]


def pairs_of(responses: Responses, totals: np.ndarray) -> list[tuple[One, One]]:
    """(better, worse) of every row that counts, one after another."""
    fields = {
        name: np.asarray(value) for name, value in responses.fields.items() if value.ndim == 2
    }
    lengths = np.asarray(responses.mask.sum(-1))
    reference = np.asarray(responses.reference)

    def one(row: int, place: int) -> One:
        own = {name: value[row, place] for name, value in fields.items()}
        return One(totals[row, place], reference[row, place], lengths[row, place], own)

    ranks, found = fields["rank"], []
    for row in range(len(ranks)):
        there = [place for place in range(ranks.shape[1]) if ranks[row, place] > 0]
        found += [
            (one(row, better), one(row, worse))
            for better in there
            for worse in there
            if ranks[row, better] < ranks[row, worse] and WEIGHTS[row]
        ]
    return found


def expected(name, options, responses, totals, frozen):
    pairs = pairs_of(responses, totals)
    if name in BATCHES:
        return BATCHES[name](pairs, pairs_of(responses, frozen), **options)
    options = {"w_" if name == "mm_dpo" and k == "w" else k: v for k, v in options.items()}
    return np.mean([PAIRS[name](*pair, **options) for pair in pairs])


@pytest.fixture(scope="module")
def responses():
    with jax.enable_x64(True):
        yield ranked(RANKS)


def check(responses, formula, value, gradient):
    """`formula` takes the sums of the policy's log-probs, and those that have no gradient."""
    totals = np.asarray(responses.total)
    assert value == pytest.approx(formula(totals, totals), rel=2e-8)  # lengths are float32
    slopes = np.zeros_like(totals)
    for place in np.ndindex(totals.shape):
        change = np.zeros_like(totals)
        change[place] = STEP
        up, down = formula(totals + change, totals), formula(totals - change, totals)
        slopes[place] = (up - down) / (2 * STEP)
    assert np.abs(slopes).max() > 1e-5
    # Every token of a response has the slope of its sum.
    np.testing.assert_allclose(
        gradient, slopes[..., None] * responses.mask, rtol=1e-5, atol=1e-7 * max(1, abs(value))
    )


@pytest.mark.parametrize(("name", "options"), CASES)
def test_loss_and_gradient(responses, name, options):
    with jax.enable_x64(True):
        value, gradient = value_and_gradient(term_of(name, **options), responses, WEIGHTS)
    check(responses, lambda *sums: expected(name, options, responses, *sums), value, gradient)


@pytest.mark.parametrize(
    "options",
    [{}, {"beta": 2.0, "gamma": 0.3, "sft_weight": 0.05, "length_average": True}],
)
def test_triple_po_learns_the_gold_response_and_pairs_the_others(responses, options):
    beta, gamma, weight, average = (
        options.get(key, default)
        for key, default in (
            ("beta", 0.01), ("gamma", 0.0), ("sft_weight", 1.0), ("length_average", False)
        )
    )  # fmt: skip

    def formula(totals, _):
        losses = []
        for better, worse in pairs_of(responses, totals):
            if better.fields["gold"] or worse.fields["gold"]:
                continue
            row = int(np.argwhere(np.asarray(responses.reference) == better.reference)[0, 0])
            place = int(np.argmax(responses.fields["gold"][row]))
            gold = totals[row, place] / int(responses.mask[row, place].sum())
            a, b = (x.mean if average else x.policy for x in (better, worse))
            losses.append(-log_sigmoid(beta * (a - b) - gamma) - weight * gold)
        assert len(losses) == 6  # 5 of the first row less a tie, 1 of the last
        return np.mean(losses)

    with jax.enable_x64(True):
        value, gradient = value_and_gradient(term_of("triple_po", **options), responses, WEIGHTS)
    check(responses, formula, value, gradient)


def test_selm_is_dpo_of_the_others_and_an_extra_response(responses):
    beta, alpha = 0.3, 0.2

    def formula(totals, _):
        losses = []
        for better, worse in pairs_of(responses, totals):
            if better.fields["gold"] or worse.fields["gold"]:
                continue
            row = int(np.argwhere(np.asarray(responses.reference) == better.reference)[0, 0])
            place = int(np.argmax(responses.fields["gold"][row]))
            extra = totals[row, place] - float(responses.reference[row, place])
            z = beta * (better.ratio - worse.ratio)
            losses.append(-log_sigmoid(z) + alpha * beta * extra)
        return np.mean(losses)

    with jax.enable_x64(True):
        term = term_of("selm", beta=beta, alpha=alpha)
        value, gradient = value_and_gradient(term, responses, WEIGHTS)
    check(responses, formula, value, gradient)


@pytest.mark.parametrize("name", ["beta_dpo"])
def test_beta_dpo_moves_its_mean_from_batch_to_batch(responses, name):
    term = term_of(name)
    pairs = pairs_of(responses, np.asarray(responses.total))
    mean = np.mean([won.ratio - lost.ratio for won, lost in pairs])
    kept, expected_mean = {"mean": np.zeros(())}, 0.0
    with jax.enable_x64(True):
        for _ in range(3):
            before, expected_mean = expected_mean, 0.9 * expected_mean + 0.1 * mean
            sums, kept = term.objective.apply(responses, np.array(WEIGHTS), kept, term.options)
            assert float(kept["mean"]) == pytest.approx(expected_mean, rel=1e-9)
            value = BATCHES[name](pairs, pairs, before=before)
            assert float(sums.loss / sums.weight) == pytest.approx(value, rel=1e-9)
        _, same = term.objective.apply(responses, np.zeros(5), kept, term.options)
    assert float(same["mean"]) == float(kept["mean"])  # a batch without pairs says nothing


def test_length_desensitisation_shortens_the_longer_response(responses):
    """LD-DPO: tokens beyond the shorter response's length count alpha times, per pair."""
    alpha = 0.3
    log_probs, reference = (
        np.asarray(x) for x in (responses.log_probs, responses.reference_log_probs)
    )
    lengths, ranks = np.asarray(responses.mask.sum(-1)), np.asarray(responses.fields["rank"])
    losses = []
    for row in np.flatnonzero(WEIGHTS):
        for i, j in np.ndindex(5, 5):
            if not 0 < ranks[row, i] < ranks[row, j]:
                continue
            common = min(lengths[row, i], lengths[row, j])
            a, b = (
                (tokens[:common].sum() + alpha * tokens[common:].sum())
                for tokens in (log_probs[row, i] - reference[row, i],
                               log_probs[row, j] - reference[row, j])
            )  # fmt: skip
            losses.append(-log_sigmoid(0.1 * (a - b)))
    with jax.enable_x64(True):
        value, _ = value_and_gradient(term_of("dpo", ld_alpha=alpha), responses, WEIGHTS)
        plain, _ = value_and_gradient(term_of("dpo"), responses, WEIGHTS)
    assert value == pytest.approx(np.mean(losses), rel=1e-9)
    assert abs(value - plain) > 1e-3


def test_nll_terms_are_not_desensitised(responses):
    with jax.enable_x64(True):
        for name in ("rpo", "cpo", "slic"):
            parts = [
                value_and_gradient(term_of(name, ld_alpha=0.3, sft_weight=weight), responses)[0]
                for weight in (0.0, 1.0)
            ]
            full = [
                value_and_gradient(term_of(name, sft_weight=weight), responses)[0]
                for weight in (0.0, 1.0)
            ]
            assert parts[1] - parts[0] == pytest.approx(full[1] - full[0], rel=1e-9)


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "js", "alpha"])
def test_divergences_replace_log_ratios(responses, divergence):
    """f' of the ratio u, from f: u log u, -log u, JS's, and the alpha divergence."""
    alpha = 0.7
    derivative = {
        "reverse_kl": np.log,
        "forward_kl": lambda u: 1 - 1 / u,
        "js": lambda u: np.log(2 * u / (1 + u)),
        "alpha": lambda u: (u ** (alpha - 1) - 1) / (alpha - 1),
    }[divergence]
    scores = derivative(np.exp(np.asarray(responses.ratio)))
    changed = [
        tuple(
            dataclasses.replace(x, policy=scores.ravel()[places[x.reference]], reference=0.0)
            for x in pair
        )
        for places in [{r: i for i, r in enumerate(np.asarray(responses.reference).ravel())}]
        for pair in pairs_of(responses, np.asarray(responses.total))
    ]
    options = {"divergence": divergence, "divergence_alpha": alpha}
    with jax.enable_x64(True):
        for name in ("dpo", "ipo", "exo_pair"):
            value, _ = value_and_gradient(term_of(name, **options), responses, WEIGHTS)
            assert value == pytest.approx(np.mean([PAIRS[name](*p) for p in changed]), rel=1e-9)
