"""Pairwise objectives without a reference.

log p is a response's log-prob, a = log p / |y| its average per token, w the chosen response and l
the rejected one. o = a - log(1 - e^a) are the log-odds of a response.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from mmpo_jax.objectives.pairs import EXPONENT_LIMIT, Side, pairwise
from mmpo_jax.objectives.preference import logistic, nll
from mmpo_jax.objectives.registry import NonNegative, Positive

SMALLEST = 1e-6
"""Smallest -a in log(1 - e^a): no odds are above a million."""


def log1mexp(x: Float[Array, "*d"]) -> Float[Array, "*d"]:
    """log(1 - e^x) for x < 0, exact for small and for large -x; above -SMALLEST as there."""
    x = jnp.minimum(x, -SMALLEST)
    # Each branch sees only what it can take, or its gradient of the other's would be NaN.
    near = jnp.maximum(x, -jnp.log(2.0))
    far = jnp.minimum(x, -jnp.log(2.0))
    return jnp.where(x > -jnp.log(2.0), jnp.log(-jnp.expm1(near)), jnp.log1p(-jnp.exp(far)))


def log_odds(side: Side) -> Float[Array, "N K"]:
    """o of every response."""
    return side.average - log1mexp(side.average)


@pairwise(averages=True)
def simpo(
    chosen: Side, rejected: Side, *, beta: Positive = 2.0, gamma: NonNegative = 1.0
) -> Float[Array, "N K"]:
    """SimPO: -log sigmoid(beta (a_w - a_l) - gamma).

    Meng et al. 2024 (arXiv 2405.14734), eq. 6; beta 2 to 10, gamma / beta 0.3 to 0.5, which SimPO's
    code and HALOs call `gamma_beta_ratio`. TRL's CPO trainer has it with `simpo_gamma`; CPO-SimPO
    is the list [simpo, sft].
    """
    return logistic(beta * (chosen.average - rejected.average) - gamma)


@pairwise()
def cpo(
    chosen: Side, rejected: Side, *, beta: Positive = 0.1, sft_weight: NonNegative = 1.0
) -> Float[Array, "N K"]:
    """CPO: -log sigmoid(beta (log p_w - log p_l)) - sft_weight a_w.

    Xu et al. 2024 (arXiv 2401.08417). TRL's `cpo_alpha` weighs the mean over the tokens of
    the batch: `sft_weight: 0` and the list [cpo, sft].
    """
    return logistic(beta * (chosen.total - rejected.total)) + sft_weight * nll(chosen)


@pairwise(averages=True)
def orpo(chosen: Side, rejected: Side, *, beta: Positive = 0.1) -> Float[Array, "N K"]:
    """ORPO: -a_w - beta log sigmoid(o_w - o_l).

    Hong et al. 2024 (arXiv 2403.07691), eq. 6 and 7, where beta is lambda. TRL's first term is the
    mean over the tokens of the batch, with those of the prompt.
    """
    return nll(chosen) + beta * logistic(log_odds(chosen) - log_odds(rejected))


@pairwise(averages=True)
def asft(chosen: Side, rejected: Side, *, beta: Positive = 0.1) -> Float[Array, "N K"]:
    """ASFT: -a_w - beta log sigmoid(o_w) - beta log sigmoid(-o_l).

    Wang et al. 2024, Aligned Supervised Fine-Tuning (arXiv 2409.10571), as Gorbatovski et al. 2025
    (arXiv 2502.01237), section 3.1, write it; beta is lambda, 0.1 to 1. Anchored Supervised
    Fine-Tuning (arXiv 2509.23753) is another method: `anchored_sft`.
    """
    # log sigmoid(o) = a and log sigmoid(-o) = log(1 - e^a).
    return nll(chosen) - beta * (chosen.average + log1mexp(rejected.average))


@pairwise(averages=True)
def alphapo(
    chosen: Side,
    rejected: Side,
    *,
    beta: Positive = 2.5,
    gamma: NonNegative = 0.25,
    alpha: float = 0.25,
) -> Float[Array, "N K"]:
    """AlphaPO: -log sigmoid(beta (q_w - q_l) - gamma), q = (1 - e^(-alpha a)) / alpha.

    Gupta et al. 2025 (arXiv 2501.03884): SimPO, which it is at alpha 0, with a reward whose
    shape alpha bends. TRL's CPO trainer calls it `alphapo`, with `alpha`.
    """

    def reward(side: Side) -> Float[Array, "N K"]:
        if alpha == 0:
            return side.average
        return (1 - jnp.exp(jnp.minimum(-alpha * side.average, EXPONENT_LIMIT))) / alpha

    return logistic(beta * (reward(chosen) - reward(rejected)) - gamma)


@pairwise("gold")
def triple_po(
    chosen: Side,
    rejected: Side,
    gold: Side,
    *,
    beta: Positive = 0.01,
    gamma: NonNegative = 0.0,
    sft_weight: NonNegative = 1.0,
    length_average: bool = False,
) -> Float[Array, "N K"]:
    """Triple-PO: -log sigmoid(beta (log p_w - log p_l) - gamma) - sft_weight a_gold.

    Saeidi et al. 2024 (arXiv 2405.16681): the row's best response is gold, and the pairs are
    those of the others. With length_average TPO-L: a in the place of log p, beta 2.5 or more, gamma
    above 0 and sft_weight 0.05.
    """
    first, second = chosen.total, rejected.total
    if length_average:
        first, second = chosen.average, rejected.average
    return logistic(beta * (first - second) - gamma) + sft_weight * nll(gold)
