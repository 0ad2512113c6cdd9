"""Mergers of Qwen's families: squares of patches become the decoder's tokens."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from mmpo_jax.models.layers import ACTIVATIONS, constrain_batch, stack_layers
from mmpo_jax.models.linear import linear
from mmpo_jax.models.vision_qwen import QwenVisionConfig, norm

SHARDING_RULES: tuple[tuple[str, PartitionSpec], ...] = (
    (r"multi_modal_projector/linear_1/kernel", PartitionSpec("fsdp", "tensor")),
    (r"multi_modal_projector/linear_2/kernel", PartitionSpec("tensor", "fsdp")),
    (
        r"multi_modal_projector/deepstack/layers/linear_1/kernel",
        PartitionSpec(None, "fsdp", "tensor"),
    ),
    (
        r"multi_modal_projector/deepstack/layers/linear_2/kernel",
        PartitionSpec(None, "tensor", "fsdp"),
    ),
    (r"multi_modal_projector/.*(bias|scale)", PartitionSpec()),
)


class PatchMerger(nnx.Module):
    """Squares of neighbouring patches to one token each, in the decoder's width."""

    def __init__(
        self, config: QwenVisionConfig, outputs: int, rngs: nnx.Rngs, norm_squares: bool = False
    ):
        """
        Args:
          config: of the tower.
          outputs: the decoder's width.
          rngs: for the weights.
          norm_squares: whether the norm is over whole squares and not patches.
        """
        self.inputs = config.hidden_size * config.merge_size**2
        self.norm_squares = norm_squares
        self.norm = norm(config, self.inputs if norm_squares else config.hidden_size, rngs)
        self.linear_1 = linear(self.inputs, self.inputs, True, rngs)
        self.linear_2 = linear(self.inputs, outputs, True, rngs)

    def __call__(self, x: Float[Array, "B I S D"]) -> Float[Array, "B M F"]:
        """[B, I, S, D], the patches of a square one after another -> [B, squares, outputs]."""
        squares = x.shape[0], -1, self.inputs
        merged = (
            self.norm(x.reshape(squares)) if self.norm_squares else self.norm(x).reshape(squares)
        )
        return self.linear_2(ACTIVATIONS["gelu"](self.linear_1(merged)))


class DeepMerger(PatchMerger):
    """The merger of the last layer's patches, and one for each of `deep_layers` (DeepStack, Meng et
    al. 2024, arXiv 2406.04334)."""

    def __init__(self, config: QwenVisionConfig, outputs: int, rngs: nnx.Rngs):
        super().__init__(config, outputs, rngs)
        if config.deep_layers:
            self.deepstack = DeepStack(config, outputs, rngs)

    def levels(
        self, last: Float[Array, "B I S D"], deep: Float[Array, "B L I S D"] | None
    ) -> Float[Array, "B M F"]:
        """[B, (1 + L) * squares, outputs]: the features, then those of every one of L levels."""
        features = self(last)
        if deep is None:
            return features
        return jnp.concatenate([features, self.deepstack(deep)], axis=1)


class DeepStack(nnx.Module):
    """Mergers of their own for several layers of the tower."""

    def __init__(self, config: QwenVisionConfig, outputs: int, rngs: nnx.Rngs):
        def make(rngs: nnx.Rngs) -> PatchMerger:
            return PatchMerger(config, outputs, rngs, norm_squares=True)

        self.layers = stack_layers(make, len(config.deep_layers), rngs)

    def __call__(self, x: Float[Array, "B L I S D"]) -> Float[Array, "B M F"]:
        """[B, L * squares, outputs], level after level."""
        graphdef, parameters = nnx.split(self.layers)

        def merge(_: None, level: tuple) -> tuple[None, Float[Array, "B M F"]]:
            parameters, states = level
            return None, constrain_batch(nnx.merge(graphdef, parameters)(states))

        _, made = jax.lax.scan(merge, None, (parameters, x.swapaxes(0, 1)))
        return made.swapaxes(0, 1).reshape(x.shape[0], -1, made.shape[-1])
