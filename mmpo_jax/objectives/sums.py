"""Losses and metrics as sums with weights, so that micro-batches add up exactly."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped


class WeightedSum(NamedTuple):
    """A mean before its division, so that those of several batches add up."""

    total: jax.Array
    """float32[]"""
    weight: jax.Array
    """float32[]: how much it counts; the mean of several is the sum of one by that of the other."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sums:
    """A loss before its division: adding the parts of a batch gives the whole batch's."""

    loss: jax.Array
    """float32[], or [L] of a loss with L parts: sum of the terms."""
    weight: jax.Array
    """Sum of the weights, shaped as `loss`. A batch's loss is the sum over L of loss / weight."""
    metrics: dict[str, WeightedSum]


def weighted(values: Shaped[Array, "*#d"], weights: Shaped[Array, "*#d"]) -> WeightedSum:
    """The mean of values before its division, of any shape."""
    return WeightedSum(jnp.sum(values * weights), jnp.sum(weights))


def mean(total: Float[Array, "*L"], weight: Float[Array, "*L"]) -> Float[Array, "*L"]:
    """total / weight, and 0 where nothing counts."""
    return jnp.where(weight > 0, total / jnp.where(weight > 0, weight, 1), 0)
