"""Pairwise objectives that read scores of the responses.

r is a response's log-ratio of policy and reference, D = r_w - r_l the margin of the chosen response
w over the rejected one l, s a score of the data. Scores never have a gradient.
"""

from __future__ import annotations

from typing import Annotated, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from pydantic import AfterValidator, Field

from mmpo_jax.objectives.pairs import Side, pairwise
from mmpo_jax.objectives.preference import logistic
from mmpo_jax.objectives.registry import NonNegative, Positive

SMALLEST_GAP = 1e-6
"""Smallest gap of scores in its logarithm."""


def score_gap(chosen: Side, rejected: Side, name: str = "score") -> Float[Array, "N K"]:
    """s_w - s_l."""
    return chosen.field(name) - rejected.field(name)


@pairwise("reference", "score")
def mm_dpo(
    chosen: Side,
    rejected: Side,
    *,
    beta: Positive = 0.1,
    w: NonNegative = 0.5,
    k: Positive = 0.5,
) -> Float[Array, "N K"]:
    """MM-DPO: -log sigmoid(b D), b = beta (1 + w (1 - e^(-k (s_w - s_l)))) in [beta, (1 + w) beta].

    Zhang et al. 2025, MM-RLHF (arXiv 2502.10391), section 4 and appendix F.2, with the scores of
    its reward model. The paper adds the NLL: the list [mm_dpo, sft], sft with a weight of 0 to 1.
    The released code runs another rule, `mm_dpo_batch`.
    """
    gap = jax.nn.relu(score_gap(chosen, rejected))
    scale = 1 - w * jnp.expm1(-k * gap)
    return logistic(beta * scale * (chosen.ratio - rejected.ratio))


@pairwise("reference", "score")
def odpo(
    chosen: Side,
    rejected: Side,
    *,
    beta: Positive = 0.1,
    alpha: NonNegative = 1.0,
    offset: Literal["log", "identity"] = "log",
) -> Float[Array, "N K"]:
    """ODPO: -log sigmoid(beta D - alpha f(s_w - s_l)), f the logarithm or the identity.

    Amini et al. 2024 (arXiv 2402.10571): better by more, more likely by more. The identity
    with alpha 1 is UV-CoT's sDPO (arXiv 2504.18397), g the identity. Gaps below 1e-6 count as 1e-6
    in the logarithm.
    """
    gap = score_gap(chosen, rejected)
    if offset == "log":
        gap = jnp.log(jnp.maximum(gap, SMALLEST_GAP))
    return logistic(beta * (chosen.ratio - rejected.ratio) - alpha * gap)


@pairwise("reference", "score")
def mmpo(
    chosen: Side, rejected: Side, *, beta: Positive = 0.01, tau: NonNegative = 2.2
) -> Float[Array, "N K"]:
    """MMPO: -p log sigmoid(beta D) - (1 - p) log sigmoid(-beta D), p = sigmoid(tau (s_w - s_l)).

    Kim et al. 2024, Margin Matching Preference Optimization (arXiv 2410.03145): targets as
    soft as the scores are close. tau is the code's `bt_beta`, 2.2 for Gemma 2B.
    """
    doubt = jax.nn.sigmoid(-tau * score_gap(chosen, rejected))
    return logistic(beta * (chosen.ratio - rejected.ratio), doubt)


@pairwise("reference", "consistency")
def cream(chosen: Side, rejected: Side, *, beta: Positive = 0.1) -> Float[Array, "N K"]:
    """CREAM: -C log sigmoid(beta D) - (1 - C) log sigmoid(-beta D), C the consistency.

    Wang et al. 2024 (arXiv 2410.12735): C = (Kendall tau + 1) / 2 of the rankings of the
    row's responses by the model and by the one before it, or its mean over the data; C = 1 is DPO.
    """
    return logistic(beta * (chosen.ratio - rejected.ratio), 1 - chosen.field("consistency"))


def _below_one(weights: dict[str, float]) -> dict[str, float]:
    if not weights or sum(weights.values()) >= 1:
        raise ValueError("weights of one or more dimensions must add up to less than 1")
    return weights


Dimensions = Annotated[dict[str, Annotated[float, Field(gt=0, lt=1)]], AfterValidator(_below_one)]
"""Name of a dimension -> weight; what they leave of 1 is that of the ranking."""


@pairwise("reference", "scores")
def modpo(
    chosen: Side, rejected: Side, *, beta: Positive = 0.1, dimensions: Dimensions
) -> Float[Array, "N K"]:
    """MODPO: -log sigmoid((beta D - sum_i w_i (s_i,w - s_i,l)) / w_0), w_0 = 1 - sum_i w_i.

    Zhou et al. 2023 (arXiv 2310.03708): pairs are ranked by one objective of weight w_0, and
    `dimensions` names the scores that stand for the others, with their weights.
    """
    rest = 1 - sum(dimensions.values())
    offset = sum(
        weight * score_gap(chosen, rejected, f"scores/{name}")
        for name, weight in dimensions.items()
    )
    return logistic((beta * (chosen.ratio - rejected.ratio) - offset) / rest)


@pairwise("reference", "score")
def uni_dpo(
    chosen: Side,
    rejected: Side,
    *,
    beta: Positive = 2.0,
    eta: NonNegative = 0.7,
    gamma: NonNegative = 3.0,
    tau_ref: float = 2.0,
    sft_weight: NonNegative = 1e-3,
    tau_good: float = 2.5,
) -> Float[Array, "N K"]:
    """Uni-DPO: -sigmoid(eta (s_w - s_l)) (1 - sigmoid(beta (a_w - a_l) - tau_ref))^gamma
    log sigmoid(beta (r_w / |w| - r_l / |l|)) - sft_weight [a_w < ref a_w] [s_w >= tau_good] a_w.

    Peng et al. 2025 (arXiv 2506.10054); a are log-probs per token. Weighs pairs by the
    quality of the data and by how badly the model does, with the gradient of both factors, as the
    released code. Constants of its multimodal recipe.
    """
    quality = jax.nn.sigmoid(eta * score_gap(chosen, rejected))
    contrast = beta * (chosen.average - rejected.average) - tau_ref
    need = jnp.exp(gamma * jax.nn.log_sigmoid(-contrast))
    margin = chosen.ratio / chosen.length - rejected.ratio / rejected.length
    forgotten = (chosen.ratio < 0) & (chosen.field("score") >= tau_good)
    return quality * need * logistic(beta * margin) - sft_weight * forgotten * chosen.average
