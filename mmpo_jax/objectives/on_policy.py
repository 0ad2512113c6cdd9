"""Objectives of responses that the policy itself has sampled and that were rewarded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mmpo_jax.objectives.registry import Count, NonNegative, Objective, Share, State, register
from mmpo_jax.objectives.responses import Responses
from mmpo_jax.objectives.sums import Sums, WeightedSum, weighted

Scale = Literal["group", "batch", "none"]
Aggregation = Literal["sum_then_normalize", "normalize_then_sum"]
Ratio = Literal["token", "sequence"]
Normalization = Literal["dapo", "bnpo", "grpo", "dr_grpo"]

STD_FLOOR = 1e-4
"""Added to every standard deviation, as TRL has it."""

EXPONENT_LIMIT = 40.0
"""Largest x of which e^x is taken, so that sums over many tokens stay finite in float32."""


def advantages(
    rewards: Float[Array, "N S K"],
    weights: Sequence[float],
    *,
    scale: Scale = "group",
    aggregation: Aggregation = "sum_then_normalize",
) -> Float[Array, "N S"]:
    """How much better a response was rewarded than the others.

    `sum_then_normalize`: A = (r - mean of the group) / (std + 1e-4), r being the weighted sum of
    the rewards and std that of the group, of the batch, or nothing (Shao et al. 2024, arXiv
    2402.03300, eq. 3; `none` is Dr. GRPO, arXiv 2503.20783). `normalize_then_sum`: every reward is
    normalized in its group first, and their weighted sum over the batch (GDPO, arXiv 2601.05242);
    `scale` has no part in it.

    Args:
      rewards: float32[N, S, K], K rewards of the S samples to each of N prompts.
      weights: K of them.
      scale: what the summed rewards are divided by.
      aggregation: of several rewards.

    Returns:
      float32[N, S].
    """
    of_rewards = jnp.asarray(weights, rewards.dtype)
    if aggregation == "normalize_then_sum":
        each = _centred(rewards, axis=1) / (_std(rewards, axis=1) + STD_FLOOR)
        total = (each * of_rewards).sum(axis=-1)
        return _centred(total, axis=None) / (_std(total, axis=None) + STD_FLOOR)
    total = (rewards * of_rewards).sum(axis=-1)
    centred = _centred(total, axis=1)
    if scale == "none":
        return centred
    return centred / (_std(total, axis=None if scale == "batch" else 1) + STD_FLOOR)


def _centred(values: Float[Array, "*d"], axis: int | None) -> Float[Array, "*d"]:
    return values - values.mean(axis=axis, keepdims=True)


def _std(values: jax.Array, axis: int | None) -> jax.Array:
    """Standard deviation, divided by n - 1; 0 of a single value."""
    count = values.size if axis is None else values.shape[axis]
    square = (_centred(values, axis) ** 2).sum(axis=axis, keepdims=True)
    return jnp.sqrt(square / max(count - 1, 1))


def grpo(
    responses: Responses,
    *,
    beta: NonNegative = 0.0,
    bias_corrected_kl: bool = True,
    clip: bool = True,
    epsilon_low: Share = 0.2,
    epsilon_high: NonNegative = 0.2,
    ratio: Ratio = "token",
    normalization: Normalization = "dapo",
    max_tokens: Count | None = None,
    max_log_ratio: NonNegative | None = None,
) -> tuple[Float[Array, "N S"], Float[Array, "N S"]]:
    """GRPO: -min(w A, clip(w, 1 - e_low, 1 + e_high) A) + beta w (e^(ref - p) - (ref - p) - 1).

    Shao et al. 2024 (arXiv 2402.03300), eq. 3; w = pi / pi_old of a token, or with `ratio:
    sequence` the geometric mean over the response (GSPO, arXiv 2507.18071); different e_low and
    e_high are DAPO's (arXiv 2503.14476). The paper has no w before the KL term: with it
    (`bias_corrected_kl`, as TRL has it) the gradient is that of the KL divergence (DeepSeek-V3.2,
    arXiv 2512.02556). Vision-R1 (arXiv 2503.18013) is `clip: false, bias_corrected_kl: false,
    normalization: grpo, beta: 0.2`. How rewards become A is said by the `rollout`: its `scale` is
    `group`, `batch` or `none` (Dr. GRPO, arXiv 2503.20783), its `aggregation` of several rewards
    `sum_then_normalize` or `normalize_then_sum` (GDPO, arXiv 2601.05242), see `advantages`.

    `max_log_ratio` holds log w within plus and minus it before anything else (the pre-clip of
    R1-Reward, arXiv 2505.02835, ln 1000 there); a token beyond has no gradient.

    A is the field `advantages`; log pi_old the field `old_log_probs`, and without it the policy
    itself, as in the first update with a rollout.

    `normalization`, by TRL's names: `dapo` is the mean over the tokens of the global batch, and so
    is `bnpo`, which in TRL is local; `grpo` the mean over responses of the mean over their tokens;
    `dr_grpo` the sum over tokens by the number of responses times `max_tokens`, which is the
    rollout's limit unless it is given.

    Args:
      responses: [N, S].

    Returns:
      (loss, weight), float32[N, S] each: the loss of a batch is the sum of the one by that of the
      other.

    Raises:
      ValueError: `dr_grpo` without `max_tokens`.
    """
    advantage = jax.lax.stop_gradient(responses.fields["advantages"])[..., None]
    weight = jnp.exp(log_weights(responses, ratio, max_log_ratio))
    gain = weight * advantage
    if clip:
        clipped = jnp.clip(weight, 1 - epsilon_low, 1 + epsilon_high)
        gain = jnp.minimum(gain, clipped * advantage)
    loss = -gain
    if beta:
        loss = loss + beta * kl_estimate(responses, ratio, bias_corrected_kl, max_log_ratio)
    loss = (loss * responses.mask).sum(axis=-1)
    if normalization == "grpo":
        return loss / responses.length, responses.present
    if normalization == "dr_grpo":
        if max_tokens is None:
            raise ValueError("dr_grpo divides by max_tokens")
        return loss, responses.present * max_tokens
    return loss, responses.length * responses.present


def log_weights(
    responses: Responses, ratio: Ratio, limit: float | None = None
) -> Float[Array, "N S T"]:
    """float32[N, S, T]: log pi - log pi_old of every token, or their mean over the response, within
    plus and minus a limit."""
    old = responses.fields.get("old_log_probs", responses.log_probs)
    gap = (responses.log_probs - jax.lax.stop_gradient(old)) * responses.mask
    if ratio == "sequence":
        mean = gap.sum(axis=-1, keepdims=True) / responses.length[..., None]
        gap = jnp.broadcast_to(mean, gap.shape)
    gap = gap if limit is None else jnp.clip(gap, -limit, limit)
    return jnp.minimum(gap, EXPONENT_LIMIT)


def kl_estimate(
    responses: Responses, ratio: Ratio, bias_corrected: bool, limit: float | None = None
) -> Float[Array, "N S T"]:
    """float32[N, S, T]: an unbiased estimate of KL(policy || reference) that is never negative.

    "k3" of Schulman 2020, "Approximating KL divergence": e^d - d - 1, d = log ref - log p; times
    pi / pi_old where it is bias-corrected.
    """
    gap = -responses.token_ratios
    k3 = jnp.exp(jnp.minimum(gap, EXPONENT_LIMIT)) - gap - 1
    return k3 * jnp.exp(log_weights(responses, ratio, limit)) if bias_corrected else k3


def _metrics(
    responses: Responses, weights: Float[Array, " N"], options: Mapping[str, Any]
) -> dict[str, WeightedSum]:
    """Metrics under TRL's names: `clip_ratio/...` is the share of tokens that the clipping holds
    back, or of responses where they have one ratio each."""
    counted = weights[:, None, None] * responses.mask
    metrics = {"completions/mean_length": weighted(responses.length, _each(responses, weights))}
    if options["beta"]:
        kl = kl_estimate(responses, options["ratio"], options["bias_corrected_kl"])
        metrics["kl"] = weighted(kl, counted)
    if options["clip"]:
        weight = jnp.exp(log_weights(responses, options["ratio"], options["max_log_ratio"]))
        advantage = responses.fields["advantages"][..., None]
        low = (weight < 1 - options["epsilon_low"]) & (advantage < 0)
        high = (weight > 1 + options["epsilon_high"]) & (advantage > 0)
        if options["ratio"] == "sequence":
            counted = counted / responses.length[..., None]
        metrics["clip_ratio/low_mean"] = weighted(low, counted)
        metrics["clip_ratio/high_mean"] = weighted(high, counted)
        metrics["clip_ratio/region_mean"] = weighted(low | high, counted)
    return metrics


def _each(responses: Responses, weights: Float[Array, " N"]) -> Float[Array, "N S"]:
    """float32[N, S]: the weight of every response."""
    return weights[:, None] * responses.present


def _apply(
    responses: Responses, weights: Float[Array, " N"], state: State, options: Mapping[str, Any]
) -> tuple[Sums, State]:
    loss, weight = grpo(responses, **options)
    rows = weights[:, None]
    sums = Sums(jnp.sum(loss * rows), jnp.sum(weight * rows), _metrics(responses, weights, options))
    return sums, state


register(
    Objective(
        name="grpo",
        kind="rollouts",
        function=grpo,
        apply=_apply,
        needs=frozenset({"advantages"}),
        coupled=False,
        state={},
        shared_options={},
        option_needs={"beta": ("reference_model",)},
        token_limit="max_tokens",
    )
)
