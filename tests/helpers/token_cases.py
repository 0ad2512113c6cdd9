"""Random responses for tests of objectives, one at a time for formulas in NumPy, and all together.

A formula is (chosen, rejected, chosen_0, rejected_0) -> loss of one pair: the last two are the same
responses, whose numbers stay as they were where a gradient is taken by finite differences: what has
no gradient is read from them.
"""

from __future__ import annotations

import copy
import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np

from mmpo_jax.objectives import terms as objectives
from mmpo_jax.objectives.responses import Responses

STEP = 1e-5
FLOWING = ("log_probs", "kl", "logit", "own")
"""What has a gradient; the rest is data or the reference's."""


def log_sigmoid(x):
    return -np.logaddexp(0, -x)


def l(x):  # noqa: E743 (as formulas have it)
    return -log_sigmoid(x)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def make_case(seed=0, rows=4, responses=2, tokens=6, size=1.0):
    """{name: float64[N, S, T] or [N, S]}; names of the second context end in `_m`."""
    rng = np.random.default_rng(seed)
    shape = (rows, responses, tokens)
    case = {}
    for suffix in ("", "_m"):
        case["log_probs" + suffix] = -size * np.abs(rng.standard_normal(shape)) * 2
        case["reference_log_probs" + suffix] = -size * np.abs(rng.standard_normal(shape)) * 2
        case["kl" + suffix] = size * np.abs(rng.standard_normal(shape))
        for name in ("logit", "reference_logit", "own", "reference_own"):
            case[name + suffix] = size * rng.standard_normal(shape)
    lengths = rng.integers(2, tokens + 1, shape[:2])
    case["mask"] = np.arange(tokens) < lengths[..., None]
    case["rank"] = np.argsort(rng.random(shape[:2]), axis=1) + 1.0
    case["changed"] = (rng.random(shape) < 0.4).astype(float)
    case["token_weights"] = rng.uniform(0.2, 3, shape)
    case["phrases"] = rng.integers(0, 4, shape).astype(float)
    return case


def to_responses(case) -> Responses:
    def view(suffix, views):
        kept = {
            name: jnp.asarray(case[name + suffix] * case["mask"])
            for name in ("kl", "logit", "reference_logit", "own", "reference_own")
        }
        mask = jnp.asarray(case["mask"])
        reference = jnp.asarray(case["reference_log_probs" + suffix] * mask)
        fields = {
            name: jnp.asarray(case[name])
            for name in ("rank", "changed", "token_weights", "phrases")
        }
        return Responses(
            jnp.asarray(case["log_probs" + suffix]) * mask,
            mask,
            reference.sum(axis=-1),
            reference,
            kept,
            fields,
            views,
        )

    return view("", {"other_image": view("_m", {})})


def loss_of(name, responses, weights, **options):
    term = objectives.make_term(name, **options)
    sums, _ = objectives.loss_sums([term], responses, jnp.asarray(weights), {})
    return objectives.weighted_loss([term], sums)


def one(case, row, place):
    """One response without its padding: sums over its arrays are sums over its tokens."""
    kept = case["mask"][row, place]
    values = {k: v[row, place][kept] for k, v in case.items() if k not in ("mask", "rank")}
    return types.SimpleNamespace(**values)


def expected(formula, case, weights, frozen=None):
    """The mean of the formula over all pairs of different ranks."""
    frozen = frozen or case
    total, count = 0.0, 0.0
    ranks = case["rank"]
    for row in range(len(ranks)):
        for i in range(ranks.shape[1]):
            for j in range(ranks.shape[1]):
                if ranks[row, i] < ranks[row, j]:
                    sides = [one(case, row, i), one(case, row, j)]
                    sides += [one(frozen, row, i), one(frozen, row, j)]
                    total += weights[row] * formula(*sides)
                    count += weights[row]
    return total / count


def check_formula(name, formula, case=None, places=25, **options):
    """The loss, and its gradient by finite differences at some places of every array."""
    case = case or make_case()
    weights = np.ones(len(case["rank"]))
    weights[1] = 0
    with jax.enable_x64(True):
        names = [n + suffix for n in FLOWING for suffix in ("", "_m")]

        def loss(arrays):
            return loss_of(name, to_responses(case | arrays), weights, **options)

        arrays = {n: jnp.asarray(case[n]) for n in names}
        value, slopes = jax.jit(jax.value_and_grad(loss))(arrays)
    np.testing.assert_allclose(value, expected(formula, case, weights), rtol=1e-12)
    rng = np.random.default_rng(7)
    for n in names:
        for _ in range(places // len(names) + 1):
            at = tuple(rng.integers(size) for size in case[n].shape)
            ends = []
            for step in (STEP, -STEP):
                moved = copy.deepcopy(case)
                moved[n][at] += step
                ends.append(expected(formula, moved, weights, frozen=case))
            slope = (ends[0] - ends[1]) / (2 * STEP)
            np.testing.assert_allclose(slopes[n][at], slope, rtol=1e-6, atol=1e-9, err_msg=n)
    return value


def check_extremes(name, **options):
    """Log-probs of +-1000 per token, rows without a pair, and rows of one response's weight 0."""
    case = make_case(size=1000.0)
    responses = jax.tree.map(
        lambda x: x.astype(jnp.float32) if x.dtype != bool else x, to_responses(case)
    )
    tied = dataclasses.replace(
        responses, fields=responses.fields | {"rank": jnp.ones_like(responses.fields["rank"])}
    )
    for made in (responses, tied):

        def loss(log_probs, made=made):
            part = dataclasses.replace(made, log_probs=log_probs)
            return loss_of(name, part, np.ones(4), **options)

        value, slopes = jax.jit(jax.value_and_grad(loss))(made.log_probs)
        assert np.isfinite(value)
        assert np.all(np.isfinite(slopes))
        if made is tied:
            assert value == 0
            assert not np.any(slopes)
