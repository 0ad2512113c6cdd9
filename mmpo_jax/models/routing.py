"""Which experts tokens go to, and how evenly they spread over them."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from mmpo_jax.models.layer_kinds import ExpertsConfig
from mmpo_jax.models.layers import promote, unit_norm
from mmpo_jax.models.linear import linear


class Routing(NamedTuple):
    """Where tokens go."""

    probs: Float[Array, "B S E"]
    """Of all experts, float32."""
    chosen: Int[Array, "B S k"]
    weights: Float[Array, "B S k"]
    """Of the chosen ones."""


def most_probable(
    logits: Float[Array, "B S E"], top_k: int, normalised: bool
) -> tuple[Float[Array, "B S E"], Int[Array, "B S k"], Float[Array, "B S k"]]:
    """(probabilities of all experts, the most probable ones, the shares that these have): their
    probabilities, if `normalised` divided by their sum; float32."""
    probs = jax.nn.softmax(promote(logits), axis=-1)
    weights, chosen = jax.lax.top_k(probs, top_k)
    if normalised:
        weights = weights / weights.sum(axis=-1, keepdims=True)
    return probs, chosen, weights


def loads_of(routing: Routing, counted: Bool[Array, "B S"]) -> Float[Array, "B 2 E"]:
    """Sums over the tokens of every row: how many chose an expert, and its probability.

    Args:
      routing: of a layer.
      counted: bool[B, S], which tokens count.
    """
    count = routing.probs.shape[-1]
    chose = jax.nn.one_hot(routing.chosen, count, dtype=routing.probs.dtype).sum(axis=2)
    both = jnp.stack([jax.lax.stop_gradient(chose), routing.probs], axis=2)
    return jnp.einsum("bsne,bs->bne", both, counted.astype(both.dtype))


def load_balancing_loss(loads: Float[Array, "B 2 E"], top_k: int) -> Float[Array, ""]:
    """E sum_e f_e P_e, the least where all experts have as much: f_e is the share of tokens that
    chose expert e, and P_e its mean probability (Fedus et al. 2021, arXiv 2101.03961, equations 4
    to 6), both over all tokens of all layers, as transformers has it.

    Args:
      loads: of all rows, see `loads_of`.
      top_k: experts that a token chooses.
    """
    chose, probs = loads.sum(axis=0)
    tokens = jnp.maximum(chose.sum() / top_k, 1)
    return len(chose) * jnp.sum((chose / tokens) * (probs / tokens))


class ScaledRouter(nnx.Module):
    """A router of experts beside an MLP: it normalises and scales what it reads, and scales the
    shares of the experts too (Gemma 4)."""

    def __init__(self, size: int, config: ExpertsConfig, epsilon: float, rngs: nnx.Rngs):
        self.top_k, self.normalised = config.top_k, config.normalised
        self.epsilon = epsilon
        self.proj = linear(size, config.num_experts, False, rngs)
        self.scale = nnx.Param(jnp.ones(size))
        self.per_expert_scale = nnx.Param(jnp.ones(config.num_experts))

    def __call__(self, x: Float[Array, "B S D"]) -> Routing:
        """Where tokens go, by the residual stream."""
        read = unit_norm(x, self.epsilon) * self.scale[...].astype(x.dtype) * x.shape[-1] ** -0.5
        probs, chosen, weights = most_probable(self.proj(read), self.top_k, self.normalised)
        weights = weights * promote(self.per_expert_scale[...])[chosen]
        return Routing(probs, chosen, weights.astype(x.dtype))
