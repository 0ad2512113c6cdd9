"""Objectives of single responses, which need no other response to the same prompt.

r is a response's log-ratio of policy and reference. A response is desirable or not, as the data
say; of ranked responses the best ones are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mmpo_jax.objectives.registry import (
    NonNegative,
    Objective,
    Positive,
    Rows,
    State,
    call,
    register,
)
from mmpo_jax.objectives.responses import Responses
from mmpo_jax.objectives.sums import Sums, WeightedSum, mean, weighted
from mmpo_jax.objectives.supervised import tokenwise


def pointwise(
    *needs: str,
    coupled: bool = False,
    state: Mapping[str, float] | None = None,
    mismatched: bool = False,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a function (responses [N, S], **options) -> loss float32[N, S].

    The loss of a batch is the mean over its responses.

    Args:
      *needs: names, see `Objective.needs`.
      coupled: the loss of a response depends on others: the function also takes their weights
        float32[N, S].
      state: first values of what it keeps; then it also takes a state and gives (loss, state).
      mismatched: whether it reads responses of another record, see `mismatched_kl`.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        stateful = state is not None

        def apply(
            responses: Responses,
            weights: Float[Array, " N"],
            old_state: State,
            options: Mapping[str, Any],
        ) -> tuple[Sums, State]:
            counted = weights[:, None] * responses.present
            loss, new_state = call(
                function,
                (responses,),
                counted,
                old_state,
                options,
                coupled=coupled,
                stateful=stateful,
            )
            metrics = {}
            if "desirable" in needs:
                metrics = unpaired_metrics(responses, options["beta"], counted)
            if mismatched:
                kl = mismatched_kl(responses, counted)
                metrics["kl"] = weighted(kl, counted.sum())
            return Sums(*weighted(loss, counted), metrics), new_state

        register(
            Objective(
                name=function.__name__,
                kind="single responses",
                function=function,
                apply=apply,
                needs=frozenset(needs),
                coupled=coupled or stateful,
                state=state or {},
                rows=lambda options: Rows(mismatched=mismatched),
            )
        )
        return function

    return decorate


def unpaired_metrics(
    responses: Responses, beta: float, weights: Float[Array, "N S"]
) -> dict[str, WeightedSum]:
    """TRL's names: what is desirable is chosen, the rest rejected."""
    metrics = {}
    desirable = responses.fields["desirable"]
    for name, share in (("chosen", desirable), ("rejected", 1 - desirable)):
        metrics[f"rewards/{name}"] = weighted(beta * responses.ratio, weights * share)
        metrics[f"logps/{name}"] = weighted(responses.total, weights * share)
    return metrics


def mismatched_kl(responses: Responses, weights: Float[Array, "N S"]) -> Float[Array, ""]:
    """float32[]: KTO's estimate of KL(policy || reference), without gradient: the mean log-ratio of
    responses after prompts that they do not answer, and 0 where that is negative.

    Args:
      responses: [N, S].
      weights: float32[N, S]; rows count in which one is positive.
    """
    others = responses.views["mismatched"]
    rows = weights.max(axis=1, keepdims=True)
    kl = mean(*weighted(others.ratio, rows * others.present))
    return jax.lax.stop_gradient(jnp.maximum(kl, 0))


@pointwise("reference", "desirable", coupled=True, mismatched=True)
def kto(
    responses: Responses,
    weights: Float[Array, "N S"],
    *,
    beta: Positive = 0.1,
    desirable_weight: NonNegative = 1.0,
    undesirable_weight: NonNegative = 1.0,
) -> Float[Array, "N S"]:
    """KTO: desirable w_D (1 - sigmoid(beta (r - z))), undesirable w_U (1 - sigmoid(beta (z - r))).

    Ethayarajh et al. 2024 (arXiv 2402.01306), eq. 7 and 8. z estimates KL(policy || reference) as
    the mean log-ratio of mismatched responses, at least 0, over the global batch; each record has
    those of one before it in the data, to the nearest other prompt or image. TRL rotates them
    within the batch of a device. The weights are to make up for unequal numbers: n_D w_D / (n_U
    w_U) between 1 and 4/3.
    """
    desirable = responses.fields["desirable"]
    gain = beta * (responses.ratio - mismatched_kl(responses, weights))
    return jnp.where(
        desirable > 0,
        desirable_weight * jax.nn.sigmoid(-gain),
        undesirable_weight * jax.nn.sigmoid(gain),
    )


@pointwise("reference", "desirable")
def apo_zero_unpaired(
    responses: Responses,
    *,
    beta: Positive = 0.1,
    desirable_weight: NonNegative = 1.0,
    undesirable_weight: NonNegative = 1.0,
) -> Float[Array, "N S"]:
    """APO-zero, unpaired: desirable w_D (1 - sigmoid(beta r)), undesirable w_U sigmoid(beta r).

    D'Oosterlinck et al. 2024 (arXiv 2408.06266), eq. 7, for single responses as TRL has it: KTO
    with z = 0, hence without mismatched responses.
    """
    reward = beta * responses.ratio
    return jnp.where(
        responses.fields["desirable"] > 0,
        desirable_weight * jax.nn.sigmoid(-reward),
        undesirable_weight * jax.nn.sigmoid(reward),
    )


@pointwise("reference", "desirable", coupled=True, state={"shift": 0.0, "seen": 0.0})
def bco(
    responses: Responses, weights: Float[Array, "N S"], state: State, *, beta: Positive = 0.1
) -> tuple[Float[Array, "N S"], State]:
    """BCO: desirable -log sigmoid(beta r - d), undesirable -log sigmoid(-(beta r - d)).

    Jung et al. 2024 (arXiv 2404.04656), eq. 8. The shift d is the running mean of beta r over all
    responses so far, those of this batch included, as in TRL and in InternVL's MPO; here over the
    global batch. On pairs it is half of MPO's term, which adds the two sides up.
    """
    reward = beta * responses.ratio
    shift, seen = state["shift"], state["seen"]
    count = weights.sum()
    together = jnp.maximum(seen + count, 1)
    shift = shift + jnp.sum((jax.lax.stop_gradient(reward) - shift) * weights) / together
    sign = jnp.where(responses.fields["desirable"] > 0, 1.0, -1.0)
    loss = -jax.nn.log_sigmoid(sign * (reward - shift))
    return loss, {"shift": shift, "seen": seen + count}


@pointwise("other_models")
def poft(responses: Responses) -> Float[Array, "N S"]:
    """PoFT: -log sigmoid(log p / length - mean of the same under other models).

    "Preference-Oriented Supervised Fine-Tuning" 2024 (arXiv 2412.12865), eq. 6 to 8: supervised
    fine-tuning that prefers the policy over aligned models on the same response. Their log-probs
    are per token, as each has a tokenizer of its own.
    """
    others = jax.lax.stop_gradient(responses.fields["other_models"])
    return -jax.nn.log_sigmoid(responses.average - others)


@tokenwise("score")
def rejection_sampling(
    responses: Responses, *, min_score: float | None = None
) -> tuple[Float[Array, "N S T"], Bool[Array, "N S T"]]:
    """Rejection sampling: -log p per token of the best-scored responses to every prompt.

    RAFT, Dong et al. 2023 (arXiv 2304.06767). Equal scores are all learned; what scores below
    `min_score` is not, whatever the rest.
    """
    score = jnp.where(responses.present > 0, responses.fields["score"], -jnp.inf)
    learned = score == score.max(axis=1, keepdims=True)
    if min_score is not None:
        learned &= score >= min_score
    return -responses.log_probs, responses.mask * learned[..., None]


@tokenwise("desirable")
def verified_sft(responses: Responses) -> tuple[Float[Array, "N S T"], Float[Array, "N S T"]]:
    """Verified SFT: -log p per token of the desirable responses.

    Rejection sampling with a verdict in place of a score, as in STaR, Zelikman et al. 2022
    (arXiv 2203.14465), and RFT, Yuan et al. 2023 (arXiv 2308.01825).
    """
    return -responses.log_probs, responses.mask * responses.fields["desirable"][..., None]
