"""Pairwise objectives whose loss of a pair depends on the other pairs of the global batch.

r is a response's log-ratio of policy and reference, D = r_w - r_l the margin of the chosen response
w over the rejected one l. Pairs of weight 0 do not exist here.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mmpo_jax.objectives.pairs import Side, pairwise
from mmpo_jax.objectives.preference import logistic
from mmpo_jax.objectives.registry import NonNegative, Positive, Share, Smoothing, State
from mmpo_jax.objectives.sums import mean, weighted

SMALLEST_BETA = 1e-3
"""Smallest beta, as the released codes of `beta_dpo` and `mm_dpo_batch` clip it."""


def places(values: Float[Array, "N K"], weights: Float[Array, "N K"]) -> Int[Array, "N K"]:
    """int32[N, K]: every pair's place in the ascending order of all, those of weight 0 last."""
    order = jnp.argsort(jnp.where(weights > 0, values, jnp.inf).ravel())
    return jnp.argsort(order).reshape(values.shape)


def quantile_gap(
    first: Float[Array, "N K"], second: Float[Array, "N K"], weights: Float[Array, "N K"]
) -> Float[Array, "N K"]:
    """float32[N, K]: `first` less the value of `second` at the same place of its own order."""
    ordered = jnp.sort(jnp.where(weights > 0, second, jnp.inf).ravel())
    gap = first - ordered[places(jax.lax.stop_gradient(first), weights)]
    return jnp.where(weights > 0, gap, 0)


@pairwise("reference", coupled=True, wpo=False)
def aot(
    chosen: Side,
    rejected: Side,
    weights: Float[Array, "N K"],
    *,
    beta: Positive = 0.1,
    label_smoothing: Smoothing = 0.0,
) -> Float[Array, "N K"]:
    """AOT: as dpo's, of the k-th smallest log p_w - log p_l under the policy less the k-th smallest
    under the reference.

    Melnyk et al. 2024 (arXiv 2406.05882), paired variant: stochastic dominance of the policy's
    margins over the reference's. Sorted over the global batch; TRL's `aot` sorts every device's
    micro-batch.
    """
    ours = chosen.total - rejected.total
    theirs = chosen.reference - rejected.reference
    return logistic(beta * quantile_gap(ours, theirs, weights), label_smoothing)


@pairwise("reference", coupled=True, wpo=False)
def aot_unpaired(
    chosen: Side,
    rejected: Side,
    weights: Float[Array, "N K"],
    *,
    beta: Positive = 0.1,
    label_smoothing: Smoothing = 0.0,
) -> Float[Array, "N K"]:
    """AOT unpaired: as dpo's, of the k-th smallest r_w less the k-th smallest r_l.

    Melnyk et al. 2024 (arXiv 2406.05882), unpaired variant: stochastic dominance of chosen over
    rejected rewards. Sorted over the global batch; TRL's `aot_unpaired` sorts every device's
    micro-batch.
    """
    gap = quantile_gap(chosen.ratio, rejected.ratio, weights)
    return logistic(beta * gap, label_smoothing)


def nearest(
    values: Float[Array, "N K"],
    centre: Float[Array, ""],
    weights: Float[Array, "N K"],
    share: float,
) -> Float[Array, "N K"]:
    """float32[N, K]: 1 for the share of the pairs nearest to the centre, one at least, else 0."""
    # The small number keeps 0.8 * 5 at 4.
    count = jnp.maximum(jnp.floor(share * (weights > 0).sum() + 1e-4), 1)
    kept = places(jnp.abs(values - centre), weights) < count
    return (kept & (weights > 0)).astype(jnp.float32)


@pairwise("reference", coupled=True, state={"mean": 0.0})
def beta_dpo(
    chosen: Side,
    rejected: Side,
    weights: Float[Array, "N K"],
    state: State,
    *,
    beta: Positive = 0.1,
    alpha: NonNegative = 0.6,
    drop: Share = 0.2,
    momentum: Share = 0.9,
) -> tuple[Float[Array, "N K"], State]:
    """beta-DPO: the mean over selected pairs of -log sigmoid(b D), b = max(0.001,
    beta (1 + alpha (A - M))), A the mean of the selected D, M the moving mean of D.

    Wu et al. 2024 (arXiv 2407.08639), with the released code's constants; alpha is its `a`, drop
    its `mode_weight`. M begins at 0 and has taken in the batch before it is used.

    The code draws the pairs without replacement, by a Gaussian of D around M. Here the likeliest
    stay, those nearest to M, so that a step can be repeated on any number of devices.
    """
    margin = chosen.ratio - rejected.ratio
    values = jax.lax.stop_gradient(margin)
    moved = momentum * state["mean"] + (1 - momentum) * mean(*weighted(values, weights))
    centre = jnp.where(weights.sum() > 0, moved, state["mean"])
    selected = nearest(values, centre, weights, 1 - drop)
    ahead = mean(*weighted(values, weights * selected)) - centre
    loss = logistic(jnp.maximum(SMALLEST_BETA, beta * (1 + alpha * ahead)) * margin)
    # The batch's mean is over all pairs.
    return loss * selected * mean(weights.sum(), jnp.sum(weights * selected)), {"mean": centre}


@pairwise("reference", coupled=True)
def mm_dpo_batch(
    chosen: Side,
    rejected: Side,
    weights: Float[Array, "N K"],
    *,
    beta: Positive = 0.1,
    w: NonNegative = 0.1,
    drop: Share = 0.2,
) -> Float[Array, "N K"]:
    """MM-DPO, released code: -log sigmoid(b D), b = max(0.001, beta (1 + w (A - M))), M the mean D
    of the batch, A that of the pairs nearest to M, all but the share drop.

    Zhang et al. 2025 (arXiv 2502.10391), as its trainer computes it: `beta_dpo`'s rule without the
    moving mean, which the paper's appendix rejects for `mm_dpo`. w is `ls_factor_weight`.

    The code draws 80 % of the pairs by a Gaussian of D around M. Here the likeliest are taken,
    those nearest to M, so that a step can be repeated; a single pair, for which the code gives NaN,
    has A = M.
    """
    margin = chosen.ratio - rejected.ratio
    values = jax.lax.stop_gradient(margin)
    centre = mean(*weighted(values, weights))
    selected = nearest(values, centre, weights, 1 - drop)
    ahead = mean(*weighted(values, weights * selected)) - centre
    return logistic(jnp.maximum(SMALLEST_BETA, beta * (1 + w * ahead)) * margin)
