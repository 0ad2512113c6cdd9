"""Direct preference optimisation."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mmpo_jax.objectives.sums import Sums, weighted


def dpo(
    policy: jax.Array,
    reference: jax.Array,
    weights: jax.Array,
    *,
    beta: float,
    label_smoothing: float = 0.0,
) -> Sums:
    """-log sigmoid(beta * ((pi_w - ref_w) - (pi_l - ref_l))), with conservative smoothing.

    Rafailov et al. 2023 (arXiv 2305.18290), eq. 7; label smoothing is Mitchell's cDPO:
    -(1 - e) log sigmoid(x) - e log sigmoid(-x).

    Args:
      policy: float32[B, 2] summed log-probs of the chosen and the rejected response.
      reference: float32[B, 2], the same under the frozen reference.
      weights: float32[B], 0 for rows that only fill the batch.
      beta: how strongly the policy is tied to the reference; rewards are beta * log-ratio.
      label_smoothing: e, the share of pairs assumed to be labelled the wrong way round.

    Returns:
      Sums over pairs, with TRL's metric names.
    """
    rewards = beta * (policy - reference)
    margins = rewards[:, 0] - rewards[:, 1]
    losses = -(1 - label_smoothing) * jax.nn.log_sigmoid(margins)
    losses -= label_smoothing * jax.nn.log_sigmoid(-margins)
    values = {
        "rewards/chosen": rewards[:, 0],
        "rewards/rejected": rewards[:, 1],
        "rewards/accuracies": (margins > 0).astype(jnp.float32),
        "rewards/margins": margins,
        "logps/chosen": policy[:, 0],
        "logps/rejected": policy[:, 1],
    }
    metrics = {name: weighted(value, weights) for name, value in values.items()}
    return Sums(*weighted(losses, weights), metrics)
