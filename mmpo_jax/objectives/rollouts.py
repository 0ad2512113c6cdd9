"""Objectives of sampled responses: what they read, and how losses of tokens become one number."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from mmpo_jax.objectives.registry import (
    Count,
    Objective,
    Rows,
    State,
    check_nothing,
    own_rows,
    register,
)
from mmpo_jax.objectives.responses import Responses
from mmpo_jax.objectives.sums import Sums, WeightedSum, weighted

Normalization = Literal["dapo", "bnpo", "grpo", "dr_grpo"]


class TokenLoss(NamedTuple):
    """What an objective says of every sampled token."""

    loss: Float[Array, "N S T"]
    metrics: Mapping[str, WeightedSum]
    """By TRL's names."""


Losses = Callable[[Responses, Float[Array, " N"], Mapping[str, Any]], TokenLoss]
"""(responses [N, S], weights float32[N], options) -> the loss of every token."""


def of_tokens(
    function: Callable[..., Any],
    losses: Losses,
    needs: Collection[str],
    *,
    normalization: Normalization = "dapo",
    options: Mapping[str, tuple[Any, Any]] | None = None,
    option_needs: Mapping[str, tuple[str, ...]] | None = None,
    coupled_by: Collection[str] = (),
    rows: Callable[[Mapping[str, Any]], Rows] = own_rows,
    check: Callable[[Mapping[str, Any]], None] = check_nothing,
) -> None:
    """Registers an objective of sampled responses.

    Responses that the length limit cut have no tokens for it where the field `truncated` says
    which they are, as with TRL's `mask_truncated_completions`; a mean over responses counts them.

    Args:
      function: whose name, docstring and options it has.
      losses: of tokens.
      needs: see `Objective.needs`.
      normalization: its default.
      options: others of its kind, beside `normalization` and `max_tokens`.
      option_needs, coupled_by, rows, check: see `Objective`.
    """

    def apply(
        responses: Responses, weights: Float[Array, " N"], state: State, given: Mapping[str, Any]
    ) -> tuple[Sums, State]:
        each = weights[:, None] * responses.present
        counted = without_truncated(responses)
        found = losses(counted, weights, given)
        total = (found.loss * counted.mask).sum(axis=-1)
        loss, weight = normalized(
            total, counted, responses.present, given["normalization"], given["max_tokens"]
        )
        metrics = {"completions/mean_length": weighted(responses.length, each), **found.metrics}
        rows_ = weights[:, None]
        return Sums(jnp.sum(loss * rows_), jnp.sum(weight * rows_), metrics), state

    register(
        Objective(
            name=function.__name__,
            kind="rollouts",
            function=function,
            apply=apply,
            needs=frozenset(needs),
            shared_options={
                **(options or {}),
                "normalization": (Normalization, normalization),
                "max_tokens": (Count | None, None),
            },
            option_needs=option_needs or {},
            coupled_by=frozenset(coupled_by),
            rows=rows,
            token_limit="max_tokens",
            check=check,
        )
    )


def without_truncated(responses: Responses) -> Responses:
    """The responses, of which those that are `truncated` have no tokens that count."""
    if "truncated" not in responses.fields:
        return responses
    whole = responses.fields["truncated"][..., None] == 0
    return dataclasses.replace(responses, mask=responses.mask & whole)


def normalized(
    total: Float[Array, "N S"],
    counted: Responses,
    present: Float[Array, "N S"],
    normalization: Normalization,
    max_tokens: int | None,
) -> tuple[Float[Array, "N S"], Float[Array, "N S"]]:
    """(loss, weight), float32[N, S] each: the loss of a batch is the sum of the one by that of the
    other.

    By TRL's names: `dapo` is the mean over the tokens of the global batch, and so is `bnpo`, which
    in TRL is local; `grpo` the mean over responses of the mean over their tokens; `dr_grpo` the sum
    over tokens by the number of responses times `max_tokens`.

    Args:
      total: float32[N, S], summed over the tokens that count.
      counted: with these tokens.
      present: float32[N, S], 1 where there is a response.
      normalization: which.
      max_tokens: of `dr_grpo`.

    Raises:
      ValueError: `dr_grpo` without `max_tokens`.
    """
    if normalization == "grpo":
        return total / counted.length, present
    if normalization == "dr_grpo":
        if max_tokens is None:
            raise ValueError("dr_grpo divides by max_tokens")
        return total, present * max_tokens
    return total, counted.mask.sum(axis=-1).astype(total.dtype)
