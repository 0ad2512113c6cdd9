"""What objectives read of responses: log-probs under policy and reference, and what data say."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Responses:
    """Responses in any arrangement [...]: [N, S] for N records with S responses each, [N, K] for
    one side of K pairs of every record. Each has T tokens."""

    log_probs: jax.Array
    """float32[..., T] under the policy; 0 at padding."""
    mask: jax.Array
    """bool[..., T]; the tokens that count, none where there is no response."""
    reference: jax.Array | None = None
    """float32[...]: summed log-prob under the reference."""
    reference_log_probs: jax.Array | None = None
    """float32[..., T], where an objective needs them token by token."""
    statistics: dict[str, jax.Array] = dataclasses.field(default_factory=dict)
    """name -> float32[..., T]: what else the policy says of every token, see `STATISTICS`."""
    fields: dict[str, jax.Array] = dataclasses.field(default_factory=dict)
    """name -> float32[...] or [..., T]: what the data say, see `registry.FIELDS`."""
    views: dict[str, Responses] = dataclasses.field(default_factory=dict)
    """name -> the same texts after another prompt or image; see `registry.VIEWS`."""
    rewards: jax.Array | None = None
    """float32[...]: what the policy's reward head says at the end of every response."""

    @property
    def present(self) -> Float[Array, "*d"]:
        """float32[...]: 1 where there is a response."""
        return self.mask.any(axis=-1).astype(jnp.float32)

    @property
    def length(self) -> Float[Array, "*d"]:
        """float32[...]: tokens that count; 1 where there is no response, so that means are 0."""
        return jnp.maximum(self.mask.sum(axis=-1), 1).astype(jnp.float32)

    @property
    def total(self) -> Float[Array, "*d"]:
        """float32[...]: log-prob under the policy."""
        return (self.log_probs * self.mask).sum(axis=-1)

    @property
    def average(self) -> Float[Array, "*d"]:
        """float32[...]: `total` per token."""
        return self.total / self.length

    @property
    def ratio(self) -> Float[Array, "*d"]:
        """float32[...]: log-ratio of policy and reference."""
        assert self.reference is not None
        return self.total - self.reference

    @property
    def token_ratios(self) -> Float[Array, "*d T"]:
        """float32[..., T]: log-ratio of every token that counts, else 0."""
        assert self.reference_log_probs is not None
        return (self.log_probs - self.reference_log_probs) * self.mask

    def take(self, slots: Int[Array, "N K"]) -> Responses:
        """The responses [N, K] at int32[N, K] places of [N, S]."""

        def pick(leaf: Shaped[Array, "N S *T"]) -> Shaped[Array, "N K *T"]:
            places = slots.reshape(*slots.shape, *[1] * (leaf.ndim - 2))
            return jnp.take_along_axis(leaf, places, axis=1)

        return jax.tree.map(pick, self)
