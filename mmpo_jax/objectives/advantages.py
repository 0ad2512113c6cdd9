"""Advantages: how much better a sampled response was rewarded than its prompt's others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Baseline = Literal["mean", "leave_one_out", "none"]
Scale = Literal["group", "batch", "none", "whiten"]
Aggregation = Literal["sum_then_normalize", "normalize_then_sum"]

STD_FLOOR = 1e-4
"""Added to every standard deviation, as TRL has it."""


def advantages(
    rewards: Float[Array, "N S K"],
    weights: Sequence[float],
    *,
    baseline: Baseline = "mean",
    scale: Scale = "group",
    aggregation: Aggregation = "sum_then_normalize",
    penalty: Float[Array, "N S"] | None = None,
) -> Float[Array, "N S"]:
    """How much better a response was rewarded than the others.

    `sum_then_normalize`: A = (r - b) / (s + 1e-4), r being the weighted sum of the rewards less the
    penalty. b is the `mean` of the group, that of the group without the response (`leave_one_out`,
    RLOO, Ahmadian et al. 2024, arXiv 2402.14740), or 0. s is the standard deviation of r in the
    group (Shao et al. 2024, arXiv 2402.03300, eq. 3) or in the batch; `none` divides by nothing
    (Dr. GRPO, arXiv 2503.20783), and `whiten` takes r - b less their mean over the batch by their
    standard deviation over the batch (REINFORCE++, arXiv 2501.03262: with b = 0 the plain one, with
    the mean its baseline variant). `normalize_then_sum`: every reward is normalized in its group
    first, and their weighted sum over the batch (GDPO, arXiv 2601.05242); the other options have no
    part in it.

    Args:
      rewards: float32[N, S, K], K rewards of the S samples to each of N prompts.
      weights: K of them.
      baseline: what is taken off the summed rewards.
      scale: what they are divided by.
      aggregation: of several rewards.
      penalty: float32[N, S], what is taken off the summed rewards before; None for nothing.

    Returns:
      float32[N, S].
    """
    of_rewards = jnp.asarray(weights, rewards.dtype)
    if aggregation == "normalize_then_sum":
        each = _centred(rewards, axis=1) / (_std(rewards, axis=1) + STD_FLOOR)
        total = (each * of_rewards).sum(axis=-1)
        return _centred(total, axis=None) / (_std(total, axis=None) + STD_FLOOR)
    total = (rewards * of_rewards).sum(axis=-1)
    total = total if penalty is None else total - penalty
    led = total if baseline == "none" else _centred(total, axis=1)
    if baseline == "leave_one_out":  # r - (sum - r) / (S - 1)
        led = led * (total.shape[1] / (total.shape[1] - 1))
    if scale == "none":
        return led
    if scale == "whiten":
        return _centred(led, axis=None) / (_std(led, axis=None) + STD_FLOOR)
    return led / (_std(total, axis=None if scale == "batch" else 1) + STD_FLOOR)


def _centred(values: Float[Array, "*d"], axis: int | None) -> Float[Array, "*d"]:
    return values - values.mean(axis=axis, keepdims=True)


def _std(values: jax.Array, axis: int | None) -> jax.Array:
    """Standard deviation, divided by n - 1; 0 of a single value."""
    count = values.size if axis is None else values.shape[axis]
    square = (_centred(values, axis) ** 2).sum(axis=axis, keepdims=True)
    return jnp.sqrt(square / max(count - 1, 1))
