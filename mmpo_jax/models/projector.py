"""The two dense layers between a vision tower and a decoder."""

from __future__ import annotations

from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from mmpo_jax.models.layers import ACTIVATIONS
from mmpo_jax.models.linear import linear

SHARDING_RULES: tuple[tuple[str, PartitionSpec], ...] = (
    (r"multi_modal_projector/linear_1/kernel", PartitionSpec("fsdp", "tensor")),
    (r"multi_modal_projector/linear_2/kernel", PartitionSpec("tensor", "fsdp")),
    (r"multi_modal_projector/linear_[12]/bias", PartitionSpec()),
)


class Projector(nnx.Module):
    """Image features [..., inputs] to the decoder's width [..., outputs]."""

    def __init__(self, inputs: int, outputs: int, act: str, bias: bool, rngs: nnx.Rngs):
        self.act = act
        self.linear_1 = linear(inputs, outputs, bias, rngs)
        self.linear_2 = linear(outputs, outputs, bias, rngs)

    def __call__(self, x: Float[Array, "*b D"]) -> Float[Array, "*b F"]:
        return self.linear_2(ACTIVATIONS[self.act](self.linear_1(x)))
