"""Pairwise objectives of a margin: how much more likely the chosen response has become than under
the reference, beyond the rejected one.

r is a response's log-ratio of policy and reference, D = r_w - r_l the margin of the chosen response
w over the rejected one l, log p a response's log-prob, |y| its tokens. Those with `divergence` may
put f'(pi / ref) in the place of r, see `pairs.divergence`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mmpo_jax.objectives.pairs import EXPONENT_LIMIT, Side, pairwise
from mmpo_jax.objectives.registry import NonNegative, Positive, PositiveSmoothing, Smoothing

SQUARE_LIMIT = 1e15
"""Largest value that is squared in float32; only divergences other than the reverse KL come
near it."""


def logistic(
    z: Float[Array, "*d"], smoothing: float | Float[Array, "*#d"] = 0.0
) -> Float[Array, "*d"]:
    """-(1 - e) log sigmoid(z) - e log sigmoid(-z)."""
    loss = -(1 - smoothing) * jax.nn.log_sigmoid(z)
    return loss - smoothing * jax.nn.log_sigmoid(-z)


def nll(side: Side) -> Float[Array, "N K"]:
    """Negative log-likelihood per token of every response, whatever `ld_alpha` says."""
    return -side.tokens.average


@pairwise("reference", divergences=True)
def dpo(
    chosen: Side, rejected: Side, *, beta: Positive = 0.1, label_smoothing: Smoothing = 0.0
) -> Float[Array, "N K"]:
    """DPO: -(1 - e) log sigmoid(beta D) - e log sigmoid(-beta D), e = label_smoothing.

    Rafailov et al. 2023 (arXiv 2305.18290), eq. 7; e > 0 is Mitchell's conservative cDPO, the share
    of pairs assumed to be labelled the wrong way round. TRL's `sigmoid`.

    SPIN (Chen et al. 2024, arXiv 2401.01335) is a recipe of it, or of `hinge`: the chosen responses
    are the data's, the rejected ones the start model's own, and the reference is the start model.

    Where responses have images of their own, a side is scored after its own: so does MMed-RAG
    (Xia et al. 2024, arXiv 2410.13085), whose rejected side has a noisy or unrelated image.
    """
    return logistic(beta * (chosen.ratio - rejected.ratio), label_smoothing)


@pairwise("reference", "gold")
def selm(
    chosen: Side,
    rejected: Side,
    gold: Side,
    *,
    beta: Positive = 0.01,
    alpha: NonNegative = 1e-3,
) -> Float[Array, "N K"]:
    """SELM: -log sigmoid(beta D) + alpha beta r_gold.

    Zhang et al. 2024 (arXiv 2405.19332): optimism, which makes room for responses beyond those of
    the data by making a known good one, here the row's best, less likely. The pairs are those of
    the others.
    """
    return logistic(beta * (chosen.ratio - rejected.ratio)) + alpha * beta * gold.ratio


@pairwise("reference", divergences=True)
def sigmoid_norm(chosen: Side, rejected: Side, *, beta: Positive = 0.1) -> Float[Array, "N K"]:
    """Length-normalised DPO: -log sigmoid(beta (r_w / |w| - r_l / |l|)).

    Lambert et al. 2024, Tulu 3 (arXiv 2411.15124), there with beta 5. TRL's `sigmoid_norm`.
    """
    return logistic(beta * (chosen.ratio / chosen.length - rejected.ratio / rejected.length))


@pairwise("reference", divergences=True)
def robust(
    chosen: Side, rejected: Side, *, beta: Positive = 0.1, label_smoothing: Smoothing = 0.1
) -> Float[Array, "N K"]:
    """Robust DPO: (-(1 - e) log sigmoid(beta D) + e log sigmoid(-beta D)) / (1 - 2 e).

    Chowdhury et al. 2024 (arXiv 2403.00409): unbiased where a share e = label_smoothing of
    the pairs is flipped. Also called rDPO; the image-aware rDPO is another method.
    """
    z = beta * (chosen.ratio - rejected.ratio)
    loss = -(1 - label_smoothing) * jax.nn.log_sigmoid(z)
    return (loss + label_smoothing * jax.nn.log_sigmoid(-z)) / (1 - 2 * label_smoothing)


@pairwise("reference", divergences=True)
def hinge(chosen: Side, rejected: Side, *, beta: Positive = 0.1) -> Float[Array, "N K"]:
    """Hinge: max(0, 1 - beta D).

    Liu et al. 2023, RSO (arXiv 2309.06657): SLiC's loss on DPO's margin. TRL's `hinge`; see
    `slic` for the loss without a reference.
    """
    return jax.nn.relu(1 - beta * (chosen.ratio - rejected.ratio))


@pairwise()
def slic(
    chosen: Side, rejected: Side, *, delta: Positive = 1.0, sft_weight: NonNegative = 0.1
) -> Float[Array, "N K"]:
    """SLiC-HF: max(0, delta - log p_w + log p_l) - sft_weight log p_w.

    Zhao et al. 2023 (arXiv 2305.10425), with the chosen response as what is regularised to;
    constants of HALOs, which calls them beta and lambda. TRL's `hinge` of a DPO is `hinge`.
    """
    return jax.nn.relu(delta - chosen.total + rejected.total) - sft_weight * chosen.tokens.total


@pairwise("reference", divergences=True)
def ipo(
    chosen: Side, rejected: Side, *, beta: Positive = 0.1, length_average: bool = True
) -> Float[Array, "N K"]:
    """IPO: (r_w / |w| - r_l / |l| - 1 / (2 beta))^2; without length_average (D - 1 / (2 beta))^2.

    Azar et al. 2023 (arXiv 2310.12036), eq. 17, where beta is tau and log-ratios are sums. Averages
    over tokens are what TRL and HALOs compute, as the authors did for their results.
    """
    first, second = chosen.ratio, rejected.ratio
    if length_average:
        first, second = first / chosen.length, second / rejected.length
    gap = first - second - 1 / (2 * beta)
    return jnp.clip(gap, -SQUARE_LIMIT, SQUARE_LIMIT) ** 2


@pairwise("reference", divergences=True)
def exo_pair(
    chosen: Side,
    rejected: Side,
    *,
    beta: Positive = 0.1,
    label_smoothing: PositiveSmoothing = 1e-3,
) -> Float[Array, "N K"]:
    """EXO: KL((q, 1 - q) || (1 - e, e)), q = sigmoid(beta D), e = label_smoothing.

    Ji et al. 2024 (arXiv 2402.00856), eq. 16 for two responses: the reverse of DPO's direction. e
    must be above 0, or the divergence is infinite. TRL's `exo_pair`.
    """
    z = beta * (chosen.ratio - rejected.ratio)
    log_q, log_rest = jax.nn.log_sigmoid(z), jax.nn.log_sigmoid(-z)
    loss = jnp.exp(log_q) * (log_q - jnp.log1p(-label_smoothing))
    return loss + jnp.exp(log_rest) * (log_rest - jnp.log(label_smoothing))


@pairwise("reference", divergences=True)
def discopop(
    chosen: Side, rejected: Side, *, beta: Positive = 0.1, tau: Positive = 0.05
) -> Float[Array, "N K"]:
    """DiscoPOP: -(1 - m) log sigmoid(z) + m e^-z, z = beta D, m = sigmoid(z / tau).

    Lu et al. 2024 (arXiv 2406.08414), eq. 5, the log-ratio modulated loss. TRL's `discopop`, with
    `discopop_tau`.
    """
    z = beta * (chosen.ratio - rejected.ratio)
    modulated = jnp.minimum(jax.nn.log_sigmoid(z / tau) - z, EXPONENT_LIMIT)
    return jax.nn.sigmoid(-z / tau) * logistic(z) + jnp.exp(modulated)


@pairwise("reference")
def dpop(
    chosen: Side, rejected: Side, *, beta: Positive = 0.3, penalty: NonNegative = 50.0
) -> Float[Array, "N K"]:
    """DPO-Positive: -log sigmoid(beta (D - penalty max(0, -r_w))).

    Pal et al. 2024, Smaug (arXiv 2402.13228), where the penalty is lambda: a chosen response
    must not become less likely. Some ports have the penalty outside of the sigmoid.
    """
    margin = chosen.ratio - rejected.ratio
    return logistic(beta * (margin - penalty * jax.nn.relu(-chosen.ratio)))


@pairwise("reference")
def r_dpo(
    chosen: Side, rejected: Side, *, beta: Positive = 0.1, alpha: NonNegative = 0.01
) -> Float[Array, "N K"]:
    """R-DPO: -log sigmoid(beta D + alpha (|w| - |l|)).

    Park et al. 2024 (arXiv 2403.19159): the optimum of a reward less alpha per token, so that
    length explains a part of the preference and the policy learns the rest.
    """
    margin = chosen.ratio - rejected.ratio
    return logistic(beta * margin + alpha * (chosen.length - rejected.length))


@pairwise("reference")
def rpo(
    chosen: Side, rejected: Side, *, beta: Positive = 0.1, sft_weight: NonNegative = 1.0
) -> Float[Array, "N K"]:
    """RPO: -log sigmoid(beta D) - sft_weight log p_w / |w|.

    Pang et al. 2024, Iterative RPO (arXiv 2404.19733), eq. 1, alpha 1: averages over the tokens of
    every pair. The list [dpo, sft] averages over the tokens of the batch, as `rpo_alpha` of TRL
    before 0.29 and of ms-swift does.
    """
    return logistic(beta * (chosen.ratio - rejected.ratio)) + sft_weight * nll(chosen)
