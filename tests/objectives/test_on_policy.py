"""Policy gradients and advantages against formulas in NumPy float64."""

import dataclasses

import jax
import numpy as np
import pytest
from helpers.numeric import check_extremes, gradient_of, loss_of, random_responses, slopes

from mmpo_jax.objectives.advantages import advantages
from mmpo_jax.objectives.terms import make_term
from mmpo_jax.recipes.training import Training

ADVANTAGES = np.array([[1.2, -0.7, 0.3], [-1.5, 0.0, 0.8]])


def make(old=True, seed=0):
    responses = random_responses(2, 3, seed=seed, advantages=ADVANTAGES)
    if not old:
        return responses
    drawn = np.random.default_rng(seed + 1).standard_normal(responses.mask.shape)
    fields = {**responses.fields, "old_log_probs": (responses.log_probs + 0.4 * drawn)}
    return dataclasses.replace(responses, fields=fields)


def grpo(w, a, p, low=0.2, high=0.2, delta=np.inf):
    return -np.minimum(np.minimum(w, delta) * a, np.clip(w, 1 - low, 1 + high) * a)


def sapo(w, a, p, up=1.0, down=1.05):
    t = up if a > 0 else down
    return -4 / t / (1 + np.exp(-t * (w - 1))) * a


CASES = {
    "grpo": ("grpo", {"epsilon_low": 0.1, "epsilon_high": 0.3}, lambda *x: grpo(*x, 0.1, 0.3)),
    "two-sided": ("grpo", {"delta": 1.25}, lambda *x: grpo(*x, delta=1.25)),
    "reinforce": ("reinforce", {}, lambda w, a, p: -w * a),
    "sapo": (
        "sapo",
        {"positive_temperature": 0.7, "negative_temperature": 2.0},
        lambda *x: sapo(*x, 0.7, 2.0),
    ),
}
"""name -> (objective, options, loss of tokens with weights w, an advantage a, log-probs p)."""


def weights_of(p, q, ratio):
    """Of a response's tokens."""
    gap = p - q
    if ratio == "token":
        return np.exp(gap)
    return np.exp(np.full(len(gap), gap.sum() if ratio == "trajectory" else gap.mean()))


def formula(responses, log_probs, old, token_loss, beta, kl, corrected, ratio, by, max_tokens):
    """Response by response, token by token."""
    total, tokens, means, count = 0.0, 0, 0.0, 0
    for row, column in np.ndindex(2, 3):
        length = responses.mask[row, column].sum()
        p, q = log_probs[row, column, :length], old[row, column, :length]
        r = responses.reference_log_probs[row, column, :length]
        w = weights_of(p, q, ratio)
        apart = (r - p) ** 2 / 2 if kl == "k2" else np.exp(r - p) - (r - p) - 1
        loss = token_loss(w, ADVANTAGES[row, column], p) + beta * (w if corrected else 1) * apart
        total, tokens = total + loss.sum(), tokens + length
        means, count = means + loss.mean(), count + 1
    by_ = {"grpo": count, "dr_grpo": count * max_tokens}.get(by, tokens)
    return (means if by == "grpo" else total) / by_


@pytest.mark.parametrize("normalization", ["dapo", "bnpo", "grpo", "dr_grpo"])
@pytest.mark.parametrize("ratio", ["token", "sequence", "trajectory"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("beta", "kl", "corrected"), [(0.0, "k3", True), (0.3, "k3", True), (0.2, "k2", False)]
)
def test_policy_gradients(normalization, ratio, case, beta, kl, corrected):
    name, own, token_loss = CASES[case]
    responses = make()
    options = {"beta": beta, "kl": kl, "ratio": ratio, "normalization": normalization, **own}
    options |= {"bias_corrected_kl": corrected, "max_tokens": 7}

    def value(log_probs):
        old = responses.fields["old_log_probs"]
        return formula(
            responses, log_probs, old, token_loss, beta, kl, corrected, ratio, normalization, 7
        )

    with jax.enable_x64(True):
        loss, metrics, _ = loss_of(name, responses, **options)
        slope = gradient_of(name, responses, **options)
    assert float(loss) == pytest.approx(value(responses.log_probs), rel=1e-12)
    wanted = slopes(value, responses.log_probs)
    np.testing.assert_allclose(slope, wanted, rtol=0, atol=1e-7)
    assert float(metrics["completions/mean_length"]) == responses.mask.sum(-1).mean()
    assert ("kl" in metrics) == (beta > 0)
    if name == "grpo" and ratio == "token":
        assert 0 < float(metrics["clip_ratio/region_mean"]) < 1


@pytest.mark.parametrize("bound", [1.1, 100.0])
def test_cispo(bound):
    """The weight of a token beyond the bound is the bound, and its gradient stays."""
    responses = make()
    mask, advantage = responses.mask, ADVANTAGES[..., None]
    weight = np.exp(responses.log_probs - responses.fields["old_log_probs"]) * mask
    assert (weight > bound).any() == (bound < 2)
    bounded = np.minimum(weight, bound)
    with jax.enable_x64(True):
        loss, metrics, _ = loss_of("cispo", responses, max_weight=bound)
        slope = gradient_of("cispo", responses, max_weight=bound)
    total = -(bounded * advantage * responses.log_probs * mask).sum()
    assert float(loss) == pytest.approx(total / mask.sum(), rel=1e-12)
    np.testing.assert_allclose(slope, -bounded * advantage * mask / mask.sum(), atol=1e-12)
    share = ((weight > bound) & (advantage > 0)).sum() / mask.sum()
    assert float(metrics["cispo_clip_ratio"]) == pytest.approx(share)


def test_sequence_token_has_the_value_of_the_sequence_and_gradients_of_tokens():
    """GSPO-token: with one advantage for all tokens of a response, its gradient is GSPO's."""
    responses, options = make(), {"normalization": "grpo"}
    with jax.enable_x64(True):
        losses = [
            float(loss_of("grpo", responses, ratio=ratio, **options)[0])
            for ratio in ("sequence", "sequence_token")
        ]
        found = [
            gradient_of("grpo", responses, ratio=ratio, **options)
            for ratio in ("sequence", "sequence_token")
        ]
        apart = loss_of("reinforce", responses, ratio="sequence_token", beta=0.5)[1]["kl"]
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)
    np.testing.assert_allclose(*found, atol=1e-12)
    # The weight of the KL estimate differs from token to token by its gradient alone.
    weights = np.exp(
        ((responses.log_probs - responses.fields["old_log_probs"]) * responses.mask).sum(-1)
        / responses.mask.sum(-1)
    )[..., None]
    gap = responses.reference_log_probs - responses.log_probs
    wanted = (weights * (np.exp(gap) - gap - 1) * responses.mask).sum() / responses.mask.sum()
    assert float(apart) == pytest.approx(wanted, rel=1e-12)


def with_entropy(responses, seed=5):
    entropy = np.random.default_rng(seed).random(responses.mask.shape)
    return dataclasses.replace(responses, statistics={"entropy": entropy})


@pytest.mark.parametrize("share", [0.2, 0.37, 1.0])
def test_tokens_of_high_entropy(share):
    """Those at or above the quantile that NumPy has; rows that only fill the batch do not count."""
    responses = with_entropy(make())
    weights = np.array([1.0, 0.0])
    mask, entropy = responses.mask, responses.statistics["entropy"]
    for counted in (np.ones(2), weights):
        of_counted = mask & (counted[:, None, None] > 0)
        least = np.quantile(entropy[of_counted], 1 - share)
        kept = of_counted & (entropy >= least)
        weight = np.exp(responses.log_probs - responses.fields["old_log_probs"])
        total = -(weight * ADVANTAGES[..., None])[kept].sum()
        with jax.enable_x64(True):
            loss, metrics, _ = loss_of("reinforce", responses, counted, top_entropy_quantile=share)
        assert float(loss) == pytest.approx(total / of_counted.sum(), rel=1e-12)
        assert float(metrics["entropy"]) == pytest.approx(entropy[of_counted].mean())
    assert make_term("grpo", top_entropy_quantile=0.5).coupled
    assert not make_term("grpo").coupled


@pytest.mark.parametrize("normalization", ["dapo", "grpo", "dr_grpo"])
def test_truncated_responses_teach_nothing(normalization):
    """They count among the responses, as in TRL, and not among the tokens."""
    truncated = np.array([[0, 1, 0], [0, 0, 1.0]])
    responses = make()
    fields = {**responses.fields, "truncated": truncated}
    cut = dataclasses.replace(responses, fields=fields)
    options = {"normalization": normalization, "max_tokens": 7}
    weight = np.exp(responses.log_probs - responses.fields["old_log_probs"])
    each = -weight * ADVANTAGES[..., None] * responses.mask
    kept = truncated == 0
    lengths = responses.mask.sum(-1)
    wanted = {
        "dapo": each[kept].sum() / lengths[kept].sum(),
        "grpo": (each.sum(-1) / lengths)[kept].sum() / 6,
        "dr_grpo": each[kept].sum() / (6 * 7),
    }[normalization]
    with jax.enable_x64(True):
        loss, metrics, _ = loss_of("reinforce", cut, **options)
        slope = gradient_of("reinforce", cut, **options)
    assert float(loss) == pytest.approx(wanted, rel=1e-12)
    assert not slope[~kept].any() and slope[kept].any()
    assert float(metrics["completions/mean_length"]) == lengths.mean()


@pytest.mark.parametrize("max_kl", [None, 0.05])
def test_papo(max_kl):
    """The implicit perception loss and both entropies, of tokens; gradients through both images."""
    options = {"gamma": 0.3, "entropy": 0.2, "masked_entropy": 0.1, "max_kl": max_kl}
    responses, masked = make(), random_responses(2, 3, seed=9, advantages=ADVANTAGES)
    views = {"other_image": dataclasses.replace(masked, mask=responses.mask)}
    both = dataclasses.replace(responses, views=views)
    m = np.where(responses.mask, masked.log_probs, 0)

    def value(p):
        kl = np.exp(m - p) - (m - p) - 1
        assert max_kl is None or (kl > max_kl).any()
        kl = kl if max_kl is None else np.minimum(kl, max_kl)
        return ((-0.3 * kl - 0.2 * p - 0.1 * m) * responses.mask).sum() / responses.mask.sum()

    with jax.enable_x64(True):
        loss, metrics, _ = loss_of("papo", both, **options)
        slope = gradient_of("papo", both, **options)
    assert float(loss) == pytest.approx(value(responses.log_probs), rel=1e-12)
    np.testing.assert_allclose(slope, slopes(value, responses.log_probs), rtol=0, atol=1e-7)
    assert float(metrics["perception_kl"]) > 0


@pytest.mark.parametrize("delta", [1.2, 0.5])
def test_a_delta_within_the_clipping_is_refused(delta):
    with pytest.raises(ValueError, match=r"has to be over 1 \+ epsilon_high, 1\.2"):
        Training(objective={"type": "grpo", "delta": delta})


@pytest.mark.parametrize("limit", [0.3, 100.0])
def test_log_ratios_within_a_limit(limit):
    """R1-Reward's pre-clip: beyond it a token has the limit's weight and no gradient."""
    responses = make()
    old, mask = responses.fields["old_log_probs"], responses.mask
    gap = responses.log_probs - old
    beyond = mask & (np.abs(gap) > limit)
    assert beyond.any() == (limit < 1)
    weights = np.exp(np.clip(gap, -limit, limit))
    with jax.enable_x64(True):
        loss, _, _ = loss_of("reinforce", responses, max_log_ratio=limit)
        slope = gradient_of("reinforce", responses, max_log_ratio=limit)
    expected = -(weights * np.asarray(ADVANTAGES)[..., None] * mask).sum() / mask.sum()
    assert float(loss) == pytest.approx(expected, rel=1e-12)
    learned = mask.astype(bool) & (np.asarray(ADVANTAGES)[..., None] != 0) & ~beyond
    assert not slope[beyond].any() and slope[learned].all()


def test_first_update_is_the_policy_gradient():
    """Without old log-probs the weights are 1 and have the gradient of the log-probs."""
    responses = make(old=False)
    with jax.enable_x64(True):
        loss = loss_of("grpo", responses)[0]
        slope = gradient_of("grpo", responses)
    tokens = responses.mask.sum()
    per_token = responses.mask * ADVANTAGES[..., None]
    assert float(loss) == pytest.approx(-per_token.sum() / tokens, rel=1e-12)
    np.testing.assert_allclose(slope, -per_token / tokens, rtol=1e-12)


def test_dr_grpo_needs_the_limit():
    with pytest.raises(ValueError, match="max_tokens"):
        loss_of("grpo", make(), normalization="dr_grpo")


@pytest.mark.parametrize("name", ["grpo", "reinforce", "cispo", "sapo"])
@pytest.mark.parametrize("ratio", ["token", "sequence", "trajectory"])
def test_finite(name, ratio):
    """Wherever the old log-probs lie."""
    for old in (-1000.0, 1000.0):

        def responses(old=old):
            made = make()
            fields = {**made.fields, "old_log_probs": np.full(made.mask.shape, old, np.float32)}
            return dataclasses.replace(made, fields=fields)

        check_extremes(name, responses, ratio=ratio, beta=0.1)


def standard(values):
    """z-scores as TRL has them."""
    spread = values.std(ddof=1) if values.size > 1 else 0.0
    return (values - values.mean()) / (spread + 1e-4)


def test_advantages():
    rng = np.random.default_rng(0)
    rewards, weights = rng.standard_normal((4, 5, 3)), (1.0, 0.5, 2.0)
    total = rewards @ np.array(weights)
    centred = total - total.mean(axis=1, keepdims=True)
    each = np.array([[standard(rewards[n, :, k]) for k in range(3)] for n in range(4)])
    wanted = {
        ("group", "sum_then_normalize"): np.array([standard(row) for row in total]),
        ("batch", "sum_then_normalize"): centred / (total.std(ddof=1) + 1e-4),
        ("none", "sum_then_normalize"): centred,
        ("group", "normalize_then_sum"): standard(np.einsum("nks,k->ns", each, weights)),
    }
    with jax.enable_x64(True):
        for (scale, aggregation), values in wanted.items():
            ours = advantages(rewards, weights, scale=scale, aggregation=aggregation)
            np.testing.assert_allclose(ours, values, rtol=1e-10, atol=1e-12)


def test_baselines():
    """RLOO's, REINFORCE++'s two, and a penalty that is taken off before."""
    rng = np.random.default_rng(1)
    rewards, weights = rng.standard_normal((4, 5, 2)), (1.0, 0.5)
    penalty = rng.random((4, 5))
    r = rewards @ np.array(weights) - penalty
    others = np.array([[np.delete(row, i).mean() for i in range(5)] for row in r])
    wanted = {
        ("leave_one_out", "none"): r - others,
        ("leave_one_out", "whiten"): standard(r - others),
        ("mean", "whiten"): standard(r - r.mean(axis=1, keepdims=True)),
        ("none", "whiten"): standard(r),
        ("none", "none"): r,
        ("leave_one_out", "group"): (r - others) / (r.std(axis=1, ddof=1)[:, None] + 1e-4),
    }
    with jax.enable_x64(True):
        for (baseline, scale), values in wanted.items():
            ours = advantages(rewards, weights, baseline=baseline, scale=scale, penalty=penalty)
            np.testing.assert_allclose(ours, values, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_then_sum"])
@pytest.mark.parametrize("scale", ["group", "batch", "none", "whiten"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 1, 2), (2, 4, 2)])
def test_equal_rewards_give_no_advantage(aggregation, scale, shape):
    rewards = np.full(shape, 0.5, np.float32)
    ours = advantages(rewards, (1.0,) * shape[-1], scale=scale, aggregation=aggregation)
    assert not np.asarray(ours).any()
