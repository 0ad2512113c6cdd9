"""Pairwise objectives that hold each response against the reference by itself.

r is a response's log-ratio of policy and reference, w the chosen response and l the rejected one.
"""

from __future__ import annotations

import jax
from jaxtyping import Array, Float

from mmpo_jax.objectives.pairs import Side, pairwise
from mmpo_jax.objectives.preference import logistic
from mmpo_jax.objectives.registry import Positive


@pairwise("reference")
def nca_pair(chosen: Side, rejected: Side, *, beta: Positive = 0.1) -> Float[Array, "N K"]:
    """NCA: -log sigmoid(beta r_w) - 1/2 log sigmoid(-beta r_w) - 1/2 log sigmoid(-beta r_l).

    Chen et al. 2024 (arXiv 2402.05369), for preferences. TRL's `nca_pair`.
    """
    first, second = beta * chosen.ratio, beta * rejected.ratio
    return logistic(first) + 0.5 * logistic(-first) + 0.5 * logistic(-second)


@pairwise("reference")
def bco_pair(chosen: Side, rejected: Side, *, beta: Positive = 0.1) -> Float[Array, "N K"]:
    """BCO of pairs: -log sigmoid(beta r_w) - log sigmoid(-beta r_l).

    Jung et al. 2024 (arXiv 2404.04656), without its shift: TRL's `bco_pair` in a DPO. The
    running shift of InternVL's MPO is that of BCO of single responses.
    """
    return logistic(beta * chosen.ratio) + logistic(-beta * rejected.ratio)


@pairwise("reference")
def apo_zero(chosen: Side, rejected: Side, *, beta: Positive = 0.1) -> Float[Array, "N K"]:
    """APO-zero: 1 - sigmoid(beta r_w) + sigmoid(beta r_l).

    D'Oosterlinck et al. 2024 (arXiv 2408.06266), eq. 7: for chosen responses better than the
    model's own. TRL's `apo_zero`.
    """
    return jax.nn.sigmoid(-beta * chosen.ratio) + jax.nn.sigmoid(beta * rejected.ratio)


@pairwise("reference")
def apo_down(chosen: Side, rejected: Side, *, beta: Positive = 0.1) -> Float[Array, "N K"]:
    """APO-down: sigmoid(beta r_w) + 1 - sigmoid(beta (r_w - r_l)).

    D'Oosterlinck et al. 2024 (arXiv 2408.06266), eq. 8: for chosen responses worse than the
    model's own. TRL's `apo_down`.
    """
    margin = chosen.ratio - rejected.ratio
    return jax.nn.sigmoid(beta * chosen.ratio) + jax.nn.sigmoid(-beta * margin)


@pairwise("reference")
def sppo_hard(chosen: Side, rejected: Side, *, beta: Positive = 0.1) -> Float[Array, "N K"]:
    """SPPO with hard labels: (r_w - 1 / (2 beta))^2 + (r_l + 1 / (2 beta))^2.

    Wu et al. 2024 (arXiv 2405.00675), eq. 4.7 with P = 1 for the chosen and 0 for the rejected
    response. TRL's `sppo_hard`, whose beta is the paper's 1 / eta.
    """
    return (chosen.ratio - 0.5 / beta) ** 2 + (rejected.ratio + 0.5 / beta) ** 2


@pairwise("reference", "win_rate")
def sppo(chosen: Side, rejected: Side, *, beta: Positive = 1e-3) -> Float[Array, "N K"]:
    """SPPO: 1/2 (r_w - (P_w - 1/2) / beta)^2 + 1/2 (r_l - (P_l - 1/2) / beta)^2.

    Wu et al. 2024 (arXiv 2405.00675), eq. 4.7; beta is 1 / eta. P is how likely the response beats
    one of its row: the mean of sigmoid(s - s') over the row's scores, as the released code makes it
    of PairRM's.
    """

    def error(side: Side) -> Float[Array, "N K"]:
        return 0.5 * (side.ratio - (side.field("win_rate") - 0.5) / beta) ** 2

    return error(chosen) + error(rejected)


@pairwise("reference")
def cal_dpo(chosen: Side, rejected: Side, *, beta: Positive = 0.1) -> Float[Array, "N K"]:
    """Cal-DPO: -log sigmoid(r_w - r_l) + (r_w - 1 / (2 beta))^2 + (r_l + 1 / (2 beta))^2.

    Xiao et al. 2024 (arXiv 2412.14516): DPO calibrated to rewards of +- 1/2. The first term
    has no beta.
    """
    contrast = logistic(chosen.ratio - rejected.ratio)
    return contrast + (chosen.ratio - 0.5 / beta) ** 2 + (rejected.ratio + 0.5 / beta) ** 2
