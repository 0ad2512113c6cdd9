"""Pairwise preference objectives.

r is a response's log-ratio of policy and reference, D = r_w - r_l the margin of the chosen response
w over the rejected one l.
"""

from __future__ import annotations

import jax

from mmpo_jax.objectives.pairs import Side, pairwise
from mmpo_jax.objectives.registry import Positive, Smoothing


def logistic(z: jax.Array, smoothing: float | jax.Array = 0.0) -> jax.Array:
    """-(1 - e) log sigmoid(z) - e log sigmoid(-z)."""
    loss = -(1 - smoothing) * jax.nn.log_sigmoid(z)
    return loss - smoothing * jax.nn.log_sigmoid(-z)


@pairwise("reference", divergences=True)
def dpo(
    chosen: Side, rejected: Side, *, beta: Positive = 0.1, label_smoothing: Smoothing = 0.0
) -> jax.Array:
    """DPO: -(1 - e) log sigmoid(beta D) - e log sigmoid(-beta D), e = label_smoothing.

    Rafailov et al. 2023 (arXiv 2305.18290), eq. 7; e > 0 is Mitchell's conservative cDPO, the share
    of pairs assumed to be labelled the wrong way round. TRL's `sigmoid`.
    """
    return logistic(beta * (chosen.ratio - rejected.ratio), label_smoothing)
