"""Objectives of reward models, whose head gives every response a reward."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from mmpo_jax.objectives.rankings import worse_ones
from mmpo_jax.objectives.registry import NonNegative, Objective, State, register
from mmpo_jax.objectives.responses import Responses
from mmpo_jax.objectives.sums import Sums, weighted
from mmpo_jax.objectives.supervised import tokenwise

HEAD = "reward_head"
"""Name among the statistics: float32[..., T], what the head says after every token."""


def bradley_terry(
    responses: Responses,
    *,
    margin: NonNegative = 0.0,
    tie_weight: NonNegative = 1.0,
    centring: NonNegative = 0.01,
) -> tuple[Float[Array, "N S S"], Float[Array, "N S S"]]:
    """Bradley-Terry: -log sigmoid(R_w - R_l - m (s_w - s_l)) or t (R_w - R_l)^2, + c (R_w + R_l)^2.

    Bradley and Terry 1952; m = margin times the difference of scores is Touvron et al. 2023 (arXiv
    2307.09288), eq. 2, c = centring Eisenstein et al. 2023 (arXiv 2312.09244); t = tie_weight, for
    ties, is that of MM-RLHF's code (arXiv 2502.10391), which averages them apart from the rest.

    R is what the head says after the last token of a response: after its critique, if it has one.

    Args:
      responses: [N, S] with the field `rank`, and `score` where there is a margin.

    Returns:
      (loss, weight), float32[N, S, S] each, for every two responses of a row once.
    """
    reward = final_reward(responses)
    difference = reward[:, :, None] - reward[:, None, :]
    ordered = worse_ones(responses)
    rank, present = responses.fields["rank"], responses.present > 0
    first = jnp.triu(jnp.ones(rank.shape[1:] * 2, bool), k=1)
    tied = (rank[:, :, None] == rank[:, None, :]) & present[:, :, None] & present[:, None, :]
    tied &= first
    needed: jax.Array | float = 0.0
    if margin:
        score = jax.lax.stop_gradient(responses.fields["score"])
        needed = margin * (score[:, :, None] - score[:, None, :])
    loss = jnp.where(tied, tie_weight * difference**2, -jax.nn.log_sigmoid(difference - needed))
    loss += centring * (reward[:, :, None] + reward[:, None, :]) ** 2
    return loss, (ordered | tied).astype(jnp.float32)


def final_reward(responses: Responses) -> Float[Array, "N S"]:
    """float32[N, S]: what the head says after the last token that counts; 0 without a response."""
    length = responses.mask.shape[-1]
    last = length - 1 - jnp.argmax(responses.mask[..., ::-1], axis=-1)
    reward = jnp.take_along_axis(responses.statistics[HEAD], last[..., None], axis=-1)[..., 0]
    return reward * responses.present


def _apply(
    responses: Responses, weights: Float[Array, " N"], state: State, options: Mapping[str, Any]
) -> tuple[Sums, State]:
    loss, counted = bradley_terry(responses, **options)
    counted = counted * weights[:, None, None]
    reward, ordered = final_reward(responses), worse_ones(responses) * weights[:, None, None]
    difference = reward[:, :, None] - reward[:, None, :]
    metrics = {
        "rewards/accuracies": weighted((difference > 0).astype(jnp.float32), ordered),
        "rewards/margins": weighted(difference, ordered),
    }
    return Sums(*weighted(loss, counted), metrics), state


register(
    Objective(
        name="bradley_terry",
        kind="rewards",
        function=bradley_terry,
        apply=_apply,
        needs=frozenset({"rank", HEAD}),
        coupled=False,
        state={},
        shared_options={},
        option_needs={"margin": ("score",)},
    )
)


@tokenwise(HEAD, "critique")
def critique(responses: Responses) -> tuple[Float[Array, "N S T"], Shaped[Array, "N S T"]]:
    """Critique: -log p per token of a judge's critique of the response.

    MM-RLHF's critique-based reward model (arXiv 2502.10391), which learns to write the critique
    before the head gives the reward: the two losses count the same. A critique is written after the
    response, and responses without one cost nothing.
    """
    return -responses.log_probs, responses.mask * responses.fields["critique"]
