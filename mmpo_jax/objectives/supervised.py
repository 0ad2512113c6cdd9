"""Supervised objectives: losses of tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mmpo_jax.objectives.registry import NonNegative, Objective, RowOptions, State, register
from mmpo_jax.objectives.responses import Responses
from mmpo_jax.objectives.sums import Sums, weighted

DIVERGENCE = {"kl_weight": ("kl", "reference_model")}
"""What KL(reference || policy) needs."""


def tokenwise(
    *needs: str,
    option_needs: Mapping[str, tuple[str, ...]] | None = None,
    rows: RowOptions | None = None,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a function (responses [N, S], **options) -> (loss, weight), float32[N, S, T] each.

    The loss of a batch is the mean over the tokens of all of it. Where weights are [L, N, S, T], it
    is the sum of the means of L parts.

    Args:
      *needs: names, see `Objective.needs`.
      option_needs: see `Objective.option_needs`.
      rows: options that say which rows it reads.
    """
    read = rows or RowOptions()

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        def apply(
            responses: Responses,
            weights: Float[Array, " N"],
            state: State,
            options: Mapping[str, Any],
        ) -> tuple[Sums, State]:
            own = {name: value for name, value in options.items() if name not in read.options}
            loss, counted = function(responses, **own)
            counted = counted * weights[:, None, None]
            axes = (-3, -2, -1)
            sums = (loss * counted).sum(axis=axes), counted.sum(axis=axes)
            metrics = {"nll_loss": weighted(-responses.log_probs, counted)}
            return Sums(*sums, metrics), state

        register(
            Objective(
                name=function.__name__,
                kind="tokens",
                function=function,
                apply=apply,
                needs=frozenset(needs),
                option_needs=option_needs or {},
                shared_options=read.options,
                rows=read.rows,
            )
        )
        return function

    return decorate


@tokenwise()
def sft(responses: Responses) -> tuple[Float[Array, "N S T"], Float[Array, "N S T"]]:
    """SFT: -log p per token; of ranked responses only the best are learned.

    Negative log-likelihood, averaged over the tokens of the global batch. TRL's `sft` of a
    preference averages over those of a device's micro-batch.
    """
    return -responses.log_probs, responses.mask * best(responses)[..., None]


@tokenwise("turn", option_needs=DIVERGENCE)
def nsft(
    responses: Responses, *, kl_weight: NonNegative = 0.0
) -> tuple[Float[Array, "N S T"], Float[Array, "2 N S T"]]:
    """nSFT: mean of -log p over the chosen response + the same over the dialogue that corrects it.

    Zhu et al. 2024 (arXiv 2411.14797): the turns after the response are questions and answers about
    the errors of a rejected one, which itself is not learned. `kl_weight` adds that many times
    KL(reference || policy) per token.
    """
    loss = -responses.log_probs
    if kl_weight:
        loss += kl_weight * responses.statistics["kl"]
    answer = responses.fields["turn"] == 0
    counted = responses.mask * best(responses)[..., None]
    return loss, jnp.stack([counted * answer, counted * ~answer])


@tokenwise(option_needs=DIVERGENCE)
def anchored_sft(
    responses: Responses, *, kl_weight: NonNegative = 0.05
) -> tuple[Float[Array, "N S T"], Float[Array, "N S T"]]:
    """Anchored SFT: -sg(p) log p + kl_weight KL(reference || policy) per token.

    Zhu et al. 2025 (arXiv 2509.23753); without the KL it is DFT, Wu et al. 2025 (arXiv 2508.05629).
    The divergence is taken as in the released code, whose default weight is 0.1. `asft` is another
    method: it has pairs.
    """
    loss = -jax.lax.stop_gradient(jnp.exp(responses.log_probs)) * responses.log_probs
    if kl_weight:
        loss += kl_weight * responses.statistics["kl"]
    return loss, responses.mask * best(responses)[..., None]


def best(responses: Responses) -> Float[Array, "N S"]:
    """float32[N, S]: 1 for the responses of the best rank in their row, or where nothing is
    ranked; never for those that the data call undesirable."""
    learned = responses.present
    if "rank" in responses.fields:
        rank = jnp.where(responses.present > 0, responses.fields["rank"], jnp.inf)
        learned = learned * (rank == rank.min(axis=1, keepdims=True))
    return learned * responses.fields.get("desirable", 1)
