"""Supervised objectives: losses of tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from mmpo_jax.objectives.registry import Objective, State, register
from mmpo_jax.objectives.responses import Responses
from mmpo_jax.objectives.sums import Sums, weighted


def tokenwise(*needs: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a function (responses [N, S], **options) -> (loss, weight), float32[N, S, T] each.

    The loss of a batch is the mean over the tokens of all of it.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        def apply(
            responses: Responses, weights: jax.Array, state: State, options: Mapping[str, Any]
        ) -> tuple[Sums, State]:
            loss, counted = function(responses, **options)
            counted = counted * weights[:, None, None]
            metrics = {"nll_loss": weighted(-responses.log_probs, counted)}
            return Sums(*weighted(loss, counted), metrics), state

        register(
            Objective(
                name=function.__name__,
                kind="tokens",
                function=function,
                apply=apply,
                needs=frozenset(needs),
                coupled=False,
                state={},
                shared_options={},
            )
        )
        return function

    return decorate


@tokenwise()
def sft(responses: Responses) -> tuple[jax.Array, jax.Array]:
    """SFT: -log p per token; of ranked responses only the best are learned.

    Negative log-likelihood, averaged over the tokens of the global batch. TRL's `sft` of a
    preference averages over those of a device's micro-batch.
    """
    return -responses.log_probs, responses.mask * best(responses)[..., None]


def best(responses: Responses) -> jax.Array:
    """float32[N, S]: 1 for the responses of the best rank in their row, or where nothing is
    ranked."""
    if "rank" not in responses.fields:
        return responses.present
    rank = jnp.where(responses.present > 0, responses.fields["rank"], jnp.inf)
    return responses.present * (rank == rank.min(axis=1, keepdims=True))
