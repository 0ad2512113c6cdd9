"""Preference objectives that tell tokens apart.

u_t is a token's log-ratio of policy and reference, r = sum_t u_t a response's, D = r_w - r_l the
margin of the chosen response w over the rejected one l, K = sum_t KL(reference || policy) at its
tokens.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mmpo_jax.objectives.pairs import Side, pairwise
from mmpo_jax.objectives.preference import logistic
from mmpo_jax.objectives.registry import NonNegative, Positive


@pairwise("reference_tokens", "changed", ld_alpha=False)
def ddpo(
    chosen: Side,
    rejected: Side,
    *,
    beta: Positive = 0.5,
    gamma: Positive = 5.0,
    average: bool = True,
) -> Float[Array, "N K"]:
    """DDPO: -log sigmoid(beta D'), r' = sum_t w_t u_t / sum_t w_t, w = gamma where changed, or 1.

    Yu et al. 2023 (RLHF-V, arXiv 2312.00849). The released script has gamma 1.1, beta 0.1
    and no division (`average: false`).
    """
    ratios = [
        weighted_ratio(side, changed_weights(side, gamma), average) for side in (chosen, rejected)
    ]
    return logistic(beta * (ratios[0] - ratios[1]))


@pairwise("reference_tokens", "token_weights", ld_alpha=False)
def weighted_dpo(
    chosen: Side, rejected: Side, *, beta: Positive = 0.1, average: bool = False
) -> Float[Array, "N K"]:
    """DPO of weighted tokens: -log sigmoid(beta D') with r' = sum_t w_t u_t, w from the data.

    The form of RLHF-V's code (arXiv 2312.00849) with weights of any origin; `average` divides by
    their sum.
    """
    ratios = [
        weighted_ratio(side, side.field("token_weights"), average) for side in (chosen, rejected)
    ]
    return logistic(beta * (ratios[0] - ratios[1]))


@pairwise("reference_model", "kl", ld_alpha=False)
def tdpo1(chosen: Side, rejected: Side, *, beta: Positive = 0.1) -> Float[Array, "N K"]:
    """TDPO1: -log sigmoid(beta (D - (K_l - K_w))).

    Zeng et al. 2024 (arXiv 2404.11999).
    """
    kl = divergence_of(rejected) - divergence_of(chosen)
    return logistic(beta * (chosen.ratio - rejected.ratio - kl))


@pairwise("reference_model", "kl", ld_alpha=False)
def tdpo2(
    chosen: Side, rejected: Side, *, beta: Positive = 0.1, alpha: NonNegative = 0.5
) -> Float[Array, "N K"]:
    """TDPO2: -log sigmoid(beta (D - alpha (K_l - K_w))), K_w without gradient.

    Zeng et al. 2024 (arXiv 2404.11999).
    """
    return logistic(beta * (chosen.ratio - rejected.ratio - alpha * kl_margin(chosen, rejected)))


@pairwise("reference_model", "kl", "token_weights", ld_alpha=False)
def sparse_po(chosen: Side, rejected: Side, *, beta: Positive = 0.1) -> Float[Array, "N K"]:
    """SparsePO: -log sigmoid(beta (D' - (K'_l - K'_w))), sums over tokens weighted by the data's w.

    Christopoulou et al. 2024 (arXiv 2410.05102), whose masks are learned or come from activations;
    here they are given, one for both sums. With w = 1 it is `tdpo1`.
    """
    margins = []
    for side in (chosen, rejected):
        weights = side.field("token_weights")
        kl = (side.tokens.statistics["kl"] * weights * side.tokens.mask).sum(axis=-1)
        margins.append(weighted_ratio(side, weights) + kl)
    return logistic(beta * (margins[0] - margins[1]))


@pairwise("reference_model", "kl", "phrases", ld_alpha=False)
def rrpo(
    chosen: Side, rejected: Side, *, beta: Positive = 0.1, alpha: NonNegative = 0.01
) -> Float[Array, "N K"]:
    """RRPO: -log sigmoid(beta sum over phrases of (r_w - r_l)) + alpha K_w.

    Sarkar and Etemad 2025 (arXiv 2504.12083): r of a phrase sums u_t over its tokens. Phrases pair
    up by number; one whose number the other response has not does not count.
    """
    numbers = [side.field("phrases") * side.tokens.mask for side in (chosen, rejected)]
    margins = []
    for side, own, other in zip((chosen, rejected), numbers, numbers[::-1], strict=True):
        known = (own[..., :, None] == other[..., None, :]).any(axis=-1)
        margins.append(weighted_ratio(side, ((own > 0) & known).astype(jnp.float32)))
    return logistic(beta * (margins[0] - margins[1])) + alpha * divergence_of(chosen)


def changed_weights(side: Side, gamma: float) -> Float[Array, "N K T"]:
    """float32[N, K, T]: gamma in changed segments, else 1."""
    return 1 + (gamma - 1) * side.field("changed")


def weighted_ratio(
    side: Side, weights: Float[Array, "N K T"], average: bool = False
) -> Float[Array, "N K"]:
    """float32[N, K]: the log-ratio of a side with weights float32[N, K, T] of its tokens; divided
    by their sum if `average`."""
    total = (side.tokens.token_ratios * weights).sum(axis=-1)
    if not average:
        return total
    counted = (weights * side.tokens.mask).sum(axis=-1)
    return total / jnp.where(counted > 0, counted, 1)


def divergence_of(side: Side) -> Float[Array, "N K"]:
    """float32[N, K]: KL(reference || policy) summed over the tokens that count."""
    return (side.tokens.statistics["kl"] * side.tokens.mask).sum(axis=-1)


def kl_margin(chosen: Side, rejected: Side) -> Float[Array, "N K"]:
    """K_l - K_w, that of the chosen response without gradient."""
    return divergence_of(rejected) - jax.lax.stop_gradient(divergence_of(chosen))
