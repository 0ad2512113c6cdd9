"""Objectives of responses that the policy itself has sampled and that were rewarded.

w, A, and the options that all have: see `policy_gradient`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mmpo_jax.core.sections import keyword_options
from mmpo_jax.objectives.policy_gradient import Weighted, k3, policy_gradient
from mmpo_jax.objectives.registry import NonNegative, Positive, Share, other_image
from mmpo_jax.objectives.responses import Responses
from mmpo_jax.objectives.rollouts import TokenLoss, of_tokens
from mmpo_jax.objectives.sums import weighted


def _clipped(sampled: Weighted, options: Mapping[str, Any]) -> dict[str, Bool[Array, "N S T"]]:
    """What the clipping holds back."""
    low = (sampled.weight < 1 - options["epsilon_low"]) & (sampled.advantage < 0)
    high = (sampled.weight > 1 + options["epsilon_high"]) & (sampled.advantage > 0)
    return {
        "clip_ratio/low_mean": low,
        "clip_ratio/high_mean": high,
        "clip_ratio/region_mean": low | high,
    }


def _check_delta(options: Mapping[str, Any]) -> None:
    delta, most = options["delta"], 1 + options["epsilon_high"]
    if delta is not None and delta <= most:
        raise ValueError(f"delta {delta} has to be over 1 + epsilon_high, {most:g}")


@policy_gradient(flags=_clipped, check=_check_delta)
def grpo(
    sampled: Weighted,
    *,
    epsilon_low: Share = 0.2,
    epsilon_high: NonNegative = 0.2,
    delta: Positive | None = None,
) -> Float[Array, "N S T"]:
    """GRPO: -min(w A, clip(w, 1 - e_low, 1 + e_high) A) + beta w (e^(ref - p) - (ref - p) - 1).

    Shao et al. 2024 (arXiv 2402.03300), eq. 3; w = pi / pi_old of a token, or with `ratio:
    sequence` the geometric mean over the response (GSPO, arXiv 2507.18071), whose gradient `ratio:
    sequence_token` gives to each token by itself, or with `trajectory` the product (RLOO);
    different e_low and e_high are DAPO's (arXiv 2503.14476). `delta` bounds w from above where A is
    negative (two-sided clipping, INTELLECT-2, arXiv 2505.07291). The paper has no w before the KL
    term: with it (`bias_corrected_kl`, as TRL has it) the gradient is that of the KL divergence
    (DeepSeek-V3.2, arXiv 2512.02556); `kl: k2` is (ref - p)^2 / 2, whose gradient is that without w
    (`bias_corrected_kl: false`). How rewards become A is said by the `rollout`: its `baseline` is
    `mean`, `leave_one_out` (RLOO) or `none`, its `scale` `group`, `batch`, `none` (Dr. GRPO, arXiv
    2503.20783) or `whiten` (REINFORCE++), its `aggregation` of several rewards `sum_then_normalize`
    or `normalize_then_sum` (GDPO, arXiv 2601.05242), see `advantages`. `top_entropy_quantile`
    learns the share of the batch's tokens with the highest entropy alone (arXiv 2506.01939).
    `max_log_ratio` holds log w within plus and minus it before anything else (the pre-clip of
    R1-Reward, arXiv 2505.02835, ln 1000 there); a token beyond has no gradient. `normalization`, by
    TRL's names: `dapo` and `bnpo` are the mean over the tokens of the global batch, `grpo` the mean
    over responses of the mean over their tokens, `dr_grpo` the sum over tokens by the number of
    responses times `max_tokens`, which is the rollout's limit unless it is given.

    Args:
      sampled: [N, S, T].
    """
    bounded = sampled.weight if delta is None else jnp.minimum(sampled.weight, delta)
    clipped = jnp.clip(sampled.weight, 1 - epsilon_low, 1 + epsilon_high)
    return -jnp.minimum(bounded * sampled.advantage, clipped * sampled.advantage)


@policy_gradient()
def reinforce(sampled: Weighted) -> Float[Array, "N S T"]:
    """REINFORCE: -w A + beta w (e^(ref - p) - (ref - p) - 1), without clipping.

    Williams 1992. Vision-R1 (arXiv 2503.18013) is `bias_corrected_kl: false, normalization: grpo,
    beta: 0.2` with GRPO's advantages. Options as in `grpo`.

    Args:
      sampled: [N, S, T].
    """
    return -sampled.weight * sampled.advantage


def _over_most(sampled: Weighted, options: Mapping[str, Any]) -> dict[str, Bool[Array, "N S T"]]:
    over = (sampled.weight > options["max_weight"]) & (sampled.advantage > 0)
    return {"cispo_clip_ratio": over}


@policy_gradient(flags=_over_most)
def cispo(sampled: Weighted, *, max_weight: Positive = 5.0) -> Float[Array, "N S T"]:
    """CISPO: -min(w, max_weight) A log p, the weight without gradient.

    MiniMax-M1 2025 (arXiv 2506.13585), eq. 4: a token beyond the bound keeps its gradient.
    `max_weight` is TRL's `epsilon_high` with its loss type `cispo`. Options as in `grpo`.

    Args:
      sampled: [N, S, T].
    """
    weight = jax.lax.stop_gradient(jnp.minimum(sampled.weight, max_weight))
    return -weight * sampled.advantage * sampled.tokens.log_probs


@policy_gradient(normalization="grpo")
def sapo(
    sampled: Weighted,
    *,
    positive_temperature: Positive = 1.0,
    negative_temperature: Positive = 1.05,
) -> Float[Array, "N S T"]:
    """SAPO: -4 / t sigmoid(t (w - 1)) A, t of the sign of A.

    Gao et al. 2025 (arXiv 2511.20347): a soft gate in place of clipping, of slope 1 at w = 1; the
    higher temperature lets go of responses with a negative advantage sooner. Options as in `grpo`.

    Args:
      sampled: [N, S, T].
    """
    temperature = jnp.where(sampled.advantage > 0, positive_temperature, negative_temperature)
    gate = jax.nn.sigmoid(temperature * (sampled.weight - 1)) * 4 / temperature
    return -gate * sampled.advantage


def perception_kl(responses: Responses) -> Float[Array, "N S T"]:
    """float32[N, S, T]: an estimate of KL(pi || pi_masked) at every token that was sampled."""
    return k3(responses.views["other_image"].log_probs - responses.log_probs)


def papo(
    responses: Responses,
    *,
    gamma: NonNegative = 0.01,
    entropy: NonNegative = 0.03,
    masked_entropy: NonNegative = 0.03,
    max_kl: Positive | None = None,
) -> Float[Array, "N S T"]:
    """PAPO: -gamma (e^(m - p) - (m - p) - 1) - entropy log p - masked_entropy log m.

    Wang et al. 2025 (arXiv 2507.06448), beside `grpo` in a list: m is the log-prob after the image
    with a share of its patches masked at random, anew in every rollout (`mask_share`). The first
    term, an estimate of KL(pi || pi_masked), is to grow; the other two estimate the entropies of
    both, or it would grow by noise. `max_kl` bounds the first, token by token.

    Args:
      responses: [N, S], with the view `other_image`.
    """
    kl = perception_kl(responses)
    kl = kl if max_kl is None else jnp.minimum(kl, max_kl)
    masked = responses.views["other_image"].log_probs
    return -gamma * kl - entropy * responses.log_probs - masked_entropy * masked


def _papo_losses(
    responses: Responses, weights: Float[Array, " N"], options: Mapping[str, Any]
) -> TokenLoss:
    loss = papo(responses, **{name: options[name] for name in keyword_options(papo)})
    counted = weights[:, None, None] * responses.mask
    return TokenLoss(loss, {"perception_kl": weighted(perception_kl(responses), counted)})


_MASKED = other_image("masked")
of_tokens(papo, _papo_losses, (), options=_MASKED.options, rows=_MASKED.rows)
