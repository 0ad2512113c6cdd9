"""Preference objectives that look at the same texts after another image.

r is a response's log-ratio of policy and reference, r(m) that after the other image m, and
D = r_w - r_l the margin of the chosen response w over the rejected one l. l(z) = -log sigmoid(z).
Gradients flow through both images.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mmpo_jax.objectives.pairs import Side, pairwise
from mmpo_jax.objectives.preference import logistic
from mmpo_jax.objectives.registry import NonNegative, Positive, other_image
from mmpo_jax.objectives.responses import Responses
from mmpo_jax.objectives.token_level import changed_weights, kl_margin, weighted_ratio


def after(side: Side) -> Responses:
    """The side's responses after the other image."""
    return side.tokens.views["other_image"]


def conditional(chosen: Side) -> Float[Array, "N K"]:
    """r_w - r_w(m): how much more likely the right image makes the chosen response."""
    return chosen.tokens.ratio - after(chosen).ratio


@pairwise("reference", rows=other_image("crop"), ld_alpha=False)
def mdpo(
    chosen: Side, rejected: Side, *, beta: Positive = 0.1, delta: float = 0.0
) -> Float[Array, "N K"]:
    """mDPO: l(beta D) + l(beta (r_w - r_w(m))) + l(beta r_w - delta), l(z) = -log sigmoid(z).

    Wang et al. 2024 (arXiv 2406.11839); m is a small part of the image, enlarged. The
    last term, the anchor, keeps the chosen response from becoming less likely.
    """
    loss = logistic(beta * (chosen.ratio - rejected.ratio))
    loss += logistic(beta * conditional(chosen))
    return loss + logistic(beta * chosen.ratio - delta)


@pairwise("reference", rows=other_image("data"), ld_alpha=False)
def re_align(chosen: Side, rejected: Side, *, beta: Positive = 0.1) -> Float[Array, "N K"]:
    """Re-Align's rDPO: -log sigmoid(beta D) - log sigmoid(beta (r_w - r_w(m))).

    Xing et al. 2025 (arXiv 2502.13146); m is an image retrieved for being like it. The released
    code sums log-probs of the most probable tokens in place of the responses'; this is the paper.
    """
    return logistic(beta * (chosen.ratio - rejected.ratio)) + logistic(beta * conditional(chosen))


@pairwise("reference_model", "kl", "changed", rows=other_image("noise"), ld_alpha=False)
def chip(
    chosen: Side,
    rejected: Side,
    *,
    beta: Positive = 0.5,
    segments: NonNegative = 1 / 3,
    tokens: NonNegative = 0.1,
    gamma: Positive = 4.0,
) -> Float[Array, "N K"]:
    """CHiP: l(beta (r_w - r_w(m))) + l(beta D) + segments l(beta D') + tokens l(beta (K_w - K_l)).

    Fu et al. 2025 (arXiv 2501.16629): l(z) = -log sigmoid(z); D' is D of log-probs per token, where
    changed segments count gamma times; K is a response's KL(reference || policy), that of w without
    gradient. The token term is given a sigmoid and the direction that it has in the released code.
    """
    of_segments = [
        weighted_ratio(side, changed_weights(side, gamma), average=True)
        for side in (chosen, rejected)
    ]
    loss = logistic(beta * conditional(chosen)) + logistic(beta * (chosen.ratio - rejected.ratio))
    loss += segments * logistic(beta * (of_segments[0] - of_segments[1]))
    return loss + tokens * logistic(-beta * kl_margin(chosen, rejected))


@pairwise("reference_model", "kl", "changed", rows=other_image("noise"), ld_alpha=False)
def chip_code(
    chosen: Side,
    rejected: Side,
    *,
    beta: Positive = 0.1,
    tokens: NonNegative = 0.1,
    gamma: Positive = 4.0,
) -> Float[Array, "N K"]:
    """CHiP's code: -log sigmoid(beta (D + r_w - r_w(m) - tokens (K_l - K_w))).

    As released with arXiv 2501.16629 (LVUGAI/CHiP): one sigmoid; in every log-prob changed segments
    count gamma times (4 with LLaVA, 2 with Muffin); K as in `chip`.
    """
    weights = [changed_weights(side, gamma) for side in (chosen, rejected)]
    first, second = (
        weighted_ratio(side, weight)
        for side, weight in zip((chosen, rejected), weights, strict=True)
    )
    other = (after(chosen).token_ratios * weights[0]).sum(axis=-1)
    margin = first - second + first - other
    return logistic(beta * (margin - tokens * kl_margin(chosen, rejected)))


@pairwise("reference", rows=other_image("blank"), ld_alpha=False)
def vdpo(
    chosen: Side, rejected: Side, *, beta: Positive = 0.1, gamma: NonNegative = 0.75
) -> Float[Array, "N K"]:
    """V-DPO: -log sigmoid(beta (f_w - f_l)), f = gamma log pi + (1 - gamma) log pi(m) - log ref.

    Xie et al. 2024 (arXiv 2411.02712); m is no image, here a uniform one, and log pi(m) has no
    gradient. For pairs of images give the sides images of their own. The released script's
    gamma of 0 leaves no gradient at all.
    """

    def guided(side: Side) -> Float[Array, "N K"]:
        blind = jax.lax.stop_gradient(after(side).total)
        return gamma * side.total + (1 - gamma) * blind - side.reference

    return logistic(beta * (guided(chosen) - guided(rejected)))


@pairwise("reference_model", "own", rows=other_image("noise"), ld_alpha=False)
def povid(chosen: Side, rejected: Side, *, beta: Positive = 0.1) -> Float[Array, "N K"]:
    """POVID, stage 2: -1/2 log sigmoid(beta D) - 1/2 log sigmoid(beta (r_w - r_o)).

    Zhou et al. 2024 (arXiv 2402.11411) as released: o are the tokens most probable after the noisy
    image, given the chosen response so far, and r_o their log-ratio after the clean one; policy and
    reference take their own tokens. Stage 1 is `dpo`.
    """
    statistics, mask = chosen.tokens.statistics, chosen.tokens.mask
    own = ((statistics["own"] - statistics["reference_own"]) * mask).sum(axis=-1)
    loss = logistic(beta * (chosen.ratio - rejected.ratio))
    return (loss + logistic(beta * (chosen.ratio - own))) / 2


@pairwise("reference_model", "logit", rows=other_image("noise"), ld_alpha=False)
def tpo_visual(chosen: Side, rejected: Side, *, beta: Positive = 0.1) -> Float[Array, "N K"]:
    """Visual TPO: DPO of sum_t log(p_t c_t), c = 1/2 + sigmoid(s) of w and 3/2 - sigmoid(s) of l.

    Gu et al. 2024 (arXiv 2412.14487): s is a token's logit after the image less that after the
    noisy one. Policy and reference each have their own c, and it has a gradient, as in the released
    code.
    """

    def anchored(side: Side, sign: int) -> Float[Array, "N K"]:
        clean, noisy = side.tokens.statistics, after(side).statistics
        ratio = side.tokens.token_ratios
        for name, direction in (("logit", 1), ("reference_logit", -1)):
            anchor = 0.5 + jax.nn.sigmoid(sign * (clean[name] - noisy[name]))
            ratio += direction * jnp.log(anchor) * side.tokens.mask
        return ratio.sum(axis=-1)

    return logistic(beta * (anchored(chosen, 1) - anchored(rejected, -1)))
