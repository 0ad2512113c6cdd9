"""Objectives of a whole ranking at once; all pairs of one are in `pairs`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mmpo_jax.objectives.pairs import all_pairs, pair_metrics, sides
from mmpo_jax.objectives.registry import Objective, Positive, State, register
from mmpo_jax.objectives.responses import Responses
from mmpo_jax.objectives.sums import Sums, weighted


def listwise(*needs: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a function (responses [N, S], **options) -> loss float32[N].

    The loss of a batch is the mean over the rows in which some response is better than another.
    Metrics are those of all pairs of the rankings.

    Args:
      *needs: names, see `Objective.needs`; `rank` goes without saying.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        reference = any(need.startswith("reference") for need in needs)

        def apply(
            responses: Responses,
            weights: Float[Array, " N"],
            state: State,
            options: Mapping[str, Any],
        ) -> tuple[Sums, State]:
            ordered = worse_ones(responses).any(axis=(1, 2))
            loss = weighted(function(responses, **options), weights * ordered)
            metrics = {}
            if responses.mask.shape[1] > 1:
                better, worse, counted = all_pairs(responses, weights)
                chosen, rejected = sides(better, worse, reference, {})
                metrics = pair_metrics(chosen, rejected, options.get("beta", 1.0), counted)
            return Sums(*loss, metrics), state

        register(
            Objective(
                name=function.__name__,
                kind="rankings",
                function=function,
                apply=apply,
                needs=frozenset({"rank", *needs}),
            )
        )
        return function

    return decorate


def worse_ones(responses: Responses) -> Bool[Array, "N S S"]:
    """bool[N, S, S]: whether the second response is there and worse than the first, which is."""
    rank, present = responses.fields["rank"], responses.present > 0
    both = present[:, :, None] & present[:, None, :]
    return both & (rank[:, :, None] < rank[:, None, :])


@listwise("reference")
def plackett_luce(responses: Responses, *, beta: Positive = 0.1) -> Float[Array, " N"]:
    """Plackett-Luce: sum_i log(1 + sum_(j worse than i) exp(beta r_j - beta r_i)).

    Rafailov et al. 2023 (arXiv 2305.18290), eq. 20: the negative log-likelihood of the ranking if
    its first place is drawn with probabilities softmax(beta r), the second from the rest, and so
    on.

    Tied responses never compete with each other: each is drawn from itself and what is worse. So
    the last place and an all-tied ranking cost nothing, a ranking of two is DPO, and without ties
    this is the paper's formula.
    """
    reward = beta * responses.ratio
    gap = reward[:, None, :] - reward[:, :, None]
    worse = worse_ones(responses)
    # Not -inf, whose difference to itself has no gradient.
    competing = jnp.where(worse, gap, 0.0)
    itself = jnp.zeros_like(gap[:, :, :1])
    terms = jnp.concatenate([itself, competing], axis=2)
    counted = jnp.concatenate([jnp.ones_like(worse[:, :, :1]), worse], axis=2)
    return jax.nn.logsumexp(terms, axis=2, where=counted).sum(axis=1)
