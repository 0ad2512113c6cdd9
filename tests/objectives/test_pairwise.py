"""What holds for every pairwise objective in the registry, a new one too."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.rankings import DIMENSIONS, PAIRWISE, loss_of, ranked, term_of, value_and_gradient

from mmpo_jax.objectives.catalog import OBJECTIVES
from mmpo_jax.objectives.responses import Responses
from mmpo_jax.objectives.sums import mean
from mmpo_jax.objectives.terms import coupled

UNCOUPLED = [name for name in PAIRWISE if not OBJECTIVES[name].coupled]
OF_DATA = ("image", "noise_step", "mask_share", "joint")
"""Options that say how data are read."""
OPTIONS = [
    (name, option)
    for name in PAIRWISE
    for option in sorted(OBJECTIVES[name].options.keys() - {*OF_DATA})
]


def single(responses: Responses) -> Responses:
    """In float32."""
    return jax.tree.map(
        lambda x: np.asarray(x, np.float32 if x.dtype == np.float64 else x.dtype), responses
    )


def assert_finite(term, responses, weights=None):
    value, gradient = value_and_gradient(term, responses, weights)
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()
    return value, gradient


@pytest.fixture(scope="module")
def rankings():
    with jax.enable_x64(True):
        return ranked([[1, 3, 2, 2, 4], [2, 1, 0, 3, 1], [1, 2, 3, 4, 5]])


@pytest.mark.parametrize("name", UNCOUPLED)
def test_a_ranking_is_the_mean_over_its_pairs(rankings, name):
    """Ties and missing responses have none; Triple-PO's gold response goes with every pair."""
    term = term_of(name)
    pairs = []
    with jax.enable_x64(True):
        ranks = np.asarray(rankings.fields["rank"])
        for row, (i, j) in itertools.product(range(3), itertools.combinations(range(5), 2)):
            if ranks[row, i] == ranks[row, j] or 0 in (ranks[row, i], ranks[row, j]):
                continue
            one = jax.tree.map(lambda x, row=row: x[row : row + 1], rankings)
            slots = [i, j]
            if "gold" in term.needs:
                gold = int(np.argmax(one.fields["gold"][0]))
                if gold in slots:
                    continue
                slots.append(gold)
            pairs.append(one.take(jnp.array([slots])))
        alone = jax.tree.map(lambda *x: jnp.stack(x), *pairs)
        losses = np.asarray(jax.vmap(functools.partial(loss_of, term))(alone))
        whole, _ = value_and_gradient(term, rankings)
    assert len(losses) == (14 if "gold" in term.needs else 24)
    assert whole == pytest.approx(np.mean(losses), rel=1e-9)


@pytest.mark.parametrize("name", PAIRWISE)
def test_rows_of_weight_0_do_not_count(rankings, name):
    term = term_of(name)
    with jax.enable_x64(True):
        other = ranked([[1, 3, 2, 2, 4], [2, 1, 0, 3, 1], [1, 2, 3, 4, 5]], seed=7)
        mixed = jax.tree.map(lambda a, b: jnp.concatenate([a[:2], b[2:]]), rankings, other)
        part = jax.tree.map(lambda x: x[:2], rankings)
        value, gradient = value_and_gradient(term, mixed, [1.0, 1.0, 0.0])
        expected, slopes = value_and_gradient(term, part)
    assert value == pytest.approx(expected, rel=1e-9)
    np.testing.assert_allclose(gradient[:2], slopes, rtol=1e-9, atol=1e-12)
    assert not gradient[2].any()
    assert gradient[:2].any()


@pytest.mark.parametrize("name", PAIRWISE)
def test_order_of_responses_and_rows_does_not_matter(rankings, name):
    term = term_of(name)
    with jax.enable_x64(True):
        value, gradient = value_and_gradient(term, rankings)
        turned = jax.tree.map(lambda x: x[::-1, ::-1], rankings)
        other, slopes = value_and_gradient(term, turned)
    assert other == pytest.approx(value, rel=1e-9)
    np.testing.assert_allclose(slopes[::-1, ::-1], gradient, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("name", PAIRWISE)
def test_extreme_log_probs_stay_finite(name):
    """+- 1,000 under policy or reference, in all combinations; what no model says included."""
    with jax.enable_x64(True):
        responses = single(ranked([[1, 2, 3], [1, 2, 3]], size=2, lengths=[[2, 2, 2]] * 2))
    term = term_of(name)
    for signs in itertools.product([-500, 500], repeat=3):
        tokens = np.broadcast_to(np.float32(signs)[None, :, None], (2, 3, 2))
        assert_finite(term, dataclasses.replace(responses, log_probs=tokens))
        swapped = dataclasses.replace(
            responses, reference_log_probs=tokens, reference=tokens.sum(axis=-1)
        )
        assert_finite(term, swapped)


@pytest.mark.parametrize("name", PAIRWISE)
def test_log_probs_of_0_stay_finite(name):
    """A model that is sure of every token: p = 1 and 1 - p = 0."""
    with jax.enable_x64(True):
        responses = single(ranked([[1, 2, 3], [3, 2, 1]]))
    responses = dataclasses.replace(responses, log_probs=np.zeros_like(responses.log_probs))
    assert_finite(term_of(name), responses)


@pytest.mark.parametrize("name", PAIRWISE)
@pytest.mark.parametrize(
    ("ranks", "weights"),
    [
        ([[1, 1, 1], [2, 2, 2]], [1, 1]),
        ([[1], [1]], [1, 1]),
        ([[1, 0, 0], [0, 0, 0]], [1, 1]),
        ([[1, 2, 3], [1, 2, 3]], [0, 0]),
    ],
    ids=["ties", "single responses", "missing responses", "empty batch"],
)
def test_without_pairs_the_loss_is_0(name, ranks, weights):
    with jax.enable_x64(True):
        responses = single(ranked(ranks))
    value, gradient = assert_finite(term_of(name), responses, np.float32(weights))
    assert value == 0
    assert not gradient.any()


@pytest.mark.parametrize("name", PAIRWISE)
def test_one_pair_is_enough(name):
    """Of three responses, two of them below the third where one has to be gold."""
    ranks = [[1, 2, 3]] if "gold" in OBJECTIVES[name].needs else [[1, 2]]
    with jax.enable_x64(True):
        responses = single(ranked(ranks, seed=1))
    value, gradient = assert_finite(term_of(name), responses)
    assert gradient.any() or name in ("hinge", "slic"), value


def other_value(kind, default):
    """Of an option, none that is its default."""
    if default is ...:
        return dict.fromkeys(DIMENSIONS, 0.05)
    if isinstance(default, bool):
        return not default
    if isinstance(default, str):
        return "js"
    return 0.3 if default is None else 0.4 * default + 0.07


@pytest.fixture(scope="module")
def plain(rankings):
    """Losses with the options given and otherwise the default ones, each computed once."""
    return functools.cache(lambda name, **given: loss_of(term_of(name, **given), rankings))


@pytest.mark.parametrize(("name", "option"), OPTIONS)
def test_every_option_changes_the_loss(rankings, plain, name, option):
    kind, default = OBJECTIVES[name].options[option]
    given = {}
    if option == "divergence_alpha":
        given = {"divergence": "alpha"}
    if (name, option) == ("uni_dpo", "sft_weight"):
        given = {"tau_good": -5.0}  # below all scores
    with jax.enable_x64(True):
        # Not compiled: there are hundreds of them, each for one number.
        unchanged = plain(name, **given)
        other = {option: other_value(kind, default)}
        changed = loss_of(term_of(name, **given, **other), rankings)
    assert abs(changed - unchanged) > 1e-6


@pytest.mark.parametrize(
    ("divergence", "alpha"), [("forward_kl", 0.5), ("js", 0.5), ("alpha", 0.5), ("alpha", 2.0)]
)
def test_other_divergences_stay_finite(divergence, alpha):
    """Of log-ratios of +- 1,000 in all combinations, also where they are squared."""
    with jax.enable_x64(True):
        responses = single(ranked([[1, 2], [1, 2]], size=2, lengths=[[2, 2]] * 2))
    options = {"divergence": divergence, "divergence_alpha": alpha}
    for name in PAIRWISE:
        if "divergence" not in OBJECTIVES[name].options:
            continue
        for signs in itertools.product([-500, 500], repeat=2):
            tokens = np.broadcast_to(np.float32(signs)[None, :, None], (2, 2, 2))
            changed = dataclasses.replace(
                responses, log_probs=tokens, reference=np.zeros((2, 2), np.float32)
            )
            assert_finite(term_of(name, **options), changed)


def test_wpo_is_not_offered_where_pairs_are_sorted_apart():
    """TRL refuses it too: the loss of one pair has the rejected response of another."""
    lacking = {name for name in PAIRWISE if "wpo" not in OBJECTIVES[name].options}
    assert lacking == {"aot", "aot_unpaired"}
    with pytest.raises(TypeError, match="wpo"):
        term_of("aot", wpo=True)


@pytest.mark.parametrize("name", ["simpo", "alphapo", "orpo", "asft"])
def test_rewards_are_per_token_where_the_loss_is(rankings, name):
    """As in TRL's CPO and ORPO trainers."""
    term = term_of(name)
    with jax.enable_x64(True):
        row = jax.tree.map(lambda x: x[2:, :2], rankings)
        sums, _ = term.objective.apply(row, np.ones(1), {}, term.options)
        rewards = [float(mean(*sums.metrics[f"rewards/{x}"])) for x in ("chosen", "rejected")]
    log_probs, length = np.asarray(row.log_probs).sum(-1)[0], np.asarray(row.mask).sum(-1)[0]
    np.testing.assert_allclose(rewards, term.options["beta"] * log_probs / length, rtol=1e-9)


@pytest.mark.parametrize("name", UNCOUPLED)  # of coupled ones the pairs' losses are not apart
def test_wpo_weighs_pairs_by_their_likelihood(rankings, name):
    """exp(mean(log p - log sum p^2)) of both, as numbers."""
    with jax.enable_x64(True):
        one = jax.tree.map(lambda x: x[2:, :3], rankings)
        plain, weighed = (loss_of(term_of(name, wpo=wpo), one) for wpo in (False, True))
        even = dataclasses.replace(
            one, statistics=one.statistics | {"collision": one.log_probs - jnp.log(2.0)}
        )
        # Every token is twice as likely as two draws agree.
        assert float(loss_of(term_of(name, wpo=True), even)) == pytest.approx(
            4 * float(plain), rel=1e-6
        )
    assert not np.isclose(plain, weighed)


@pytest.mark.parametrize("name", PAIRWISE)
def test_says_its_formula_and_source(name):
    objective = OBJECTIVES[name]
    title, _, formula = objective.formula.partition(": ")
    assert title
    assert formula
    assert any(word in objective.source for word in ("arXiv", "TRL")), objective.source
    assert coupled([term_of(name)]) == objective.coupled
