"""GRPO and its advantages against formulas in NumPy float64."""

import dataclasses

import jax
import numpy as np
import pytest
from helpers.numeric import check_extremes, gradient_of, loss_of, random_responses, slopes

from mmpo_jax.objectives.on_policy import advantages

ADVANTAGES = np.array([[1.2, -0.7, 0.3], [-1.5, 0.0, 0.8]])


def make(old=True, seed=0):
    responses = random_responses(2, 3, seed=seed, advantages=ADVANTAGES)
    if not old:
        return responses
    drawn = np.random.default_rng(seed + 1).standard_normal(responses.mask.shape)
    fields = {**responses.fields, "old_log_probs": (responses.log_probs + 0.4 * drawn)}
    return dataclasses.replace(responses, fields=fields)


def formula(
    responses, log_probs, old, beta, corrected, clip, low, high, ratio, normalization, max_tokens
):
    """Response by response, token by token."""
    total, tokens, means, count = 0.0, 0, 0.0, 0
    for row, column in np.ndindex(2, 3):
        length = responses.mask[row, column].sum()
        p, q = log_probs[row, column, :length], old[row, column, :length]
        r = responses.reference_log_probs[row, column, :length]
        w = np.exp(p - q if ratio == "token" else np.full(length, (p - q).mean()))
        a = ADVANTAGES[row, column]
        gain = np.minimum(w * a, np.clip(w, 1 - low, 1 + high) * a) if clip else w * a
        loss = -gain + beta * (w if corrected else 1) * (np.exp(r - p) - (r - p) - 1)
        total, tokens = total + loss.sum(), tokens + length
        means, count = means + loss.mean(), count + 1
    by = {"grpo": count, "dr_grpo": count * max_tokens}.get(normalization, tokens)
    return (means if normalization == "grpo" else total) / by


@pytest.mark.parametrize("normalization", ["dapo", "bnpo", "grpo", "dr_grpo"])
@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize(
    ("clip", "beta", "corrected"), [(True, 0.0, True), (True, 0.3, True), (False, 0.2, False)]
)
def test_grpo(normalization, ratio, clip, beta, corrected):
    responses = make()
    options = {"beta": beta, "clip": clip, "ratio": ratio, "normalization": normalization}
    options["bias_corrected_kl"] = corrected
    options |= {"max_tokens": 7, "epsilon_low": 0.1, "epsilon_high": 0.3}

    def value(log_probs):
        old = responses.fields["old_log_probs"]
        return formula(
            responses, log_probs, old, beta, corrected, clip, 0.1, 0.3, ratio, normalization, 7
        )

    with jax.enable_x64(True):
        loss, metrics, _ = loss_of("grpo", responses, **options)
        slope = gradient_of("grpo", responses, **options)
    assert float(loss) == pytest.approx(value(responses.log_probs), rel=1e-12)
    wanted = slopes(value, responses.log_probs)
    np.testing.assert_allclose(slope, wanted, rtol=0, atol=1e-7)
    assert float(metrics["completions/mean_length"]) == responses.mask.sum(-1).mean()
    assert ("kl" in metrics) == (beta > 0)
    if clip and ratio == "token":
        assert 0 < float(metrics["clip_ratio/region_mean"]) < 1


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
        loss, _, _ = loss_of("grpo", responses, clip=False, max_log_ratio=limit)
        slope = gradient_of("grpo", responses, clip=False, max_log_ratio=limit)
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


@pytest.mark.parametrize("options", [{"beta": 0.1}, {"beta": 0.1, "clip": False}])
@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_finite(options, ratio):
    """Wherever the old log-probs lie."""
    for old in (-1000.0, 1000.0):

        def responses(old=old):
            made = make()
            fields = {**made.fields, "old_log_probs": np.full(made.mask.shape, old, np.float32)}
            return dataclasses.replace(made, fields=fields)

        check_extremes("grpo", responses, ratio=ratio, **options)


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


@pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_then_sum"])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 1, 2), (2, 4, 2)])
def test_equal_rewards_give_no_advantage(aggregation, scale, shape):
    rewards = np.full(shape, 0.5, np.float32)
    ours = advantages(rewards, (1.0,) * shape[-1], scale=scale, aggregation=aggregation)
    assert not np.asarray(ours).any()
