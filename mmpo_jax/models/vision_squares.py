"""Squares of pixels as features, without a vision transformer (Gemma 4, 12B)."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from mmpo_jax.models.layers import constrain_batch, layer_norm
from mmpo_jax.models.linear import linear

SHARDING_RULES: tuple[tuple[str, PartitionSpec], ...] = (
    (r"vision_tower/patch_dense/kernel", PartitionSpec(None, "fsdp")),
    (r"vision_tower/pos_embedding", PartitionSpec(None, None, "fsdp")),
    (r"vision_tower/\w+/(scale|bias)", PartitionSpec()),
)
EPSILON = 1e-5
"""Of torch's layer norms, which no config names."""


@dataclasses.dataclass(frozen=True)
class SquaresConfig:
    """Squares of pixels as features."""

    patch_size: int
    pool: int
    """Patches along the edge of a square."""
    hidden_size: int
    positions: int
    """Columns and rows of squares that there are learned positions for."""
    rms_norm_eps: float

    @property
    def inputs(self) -> int:
        return 3 * (self.patch_size * self.pool) ** 2


class SquareEmbedder(nnx.Module):
    """Squares of pixels, and a learned vector for the column and the row of each."""

    def __init__(self, config: SquaresConfig, rngs: nnx.Rngs):
        size = config.hidden_size
        self.patch_norm1 = layer_norm(config.inputs, EPSILON, rngs)
        self.patch_dense = linear(config.inputs, size, True, rngs)
        self.patch_norm2 = layer_norm(size, EPSILON, rngs)
        table = nnx.initializers.normal(0.5)(rngs.params(), (config.positions, 2, size))
        self.pos_embedding = nnx.Param(table)
        self.pos_norm = layer_norm(size, EPSILON, rngs)

    def __call__(
        self, pixels: Float[Array, "M N inputs"], grid: Int[Array, "M 3"]
    ) -> Float[Array, "M N D"]:
        """Features of every slot, those of its pictures first.

        Args:
          pixels: [M, N, inputs], pictures of one shape behind one another, each line by line, from
            0 to 1, padded with anything.
          grid: int32[M, 3], columns and rows of squares, and how many pictures.
        """
        pixels = pixels.astype(self.patch_dense.kernel.dtype)
        x = self.patch_norm2(self.patch_dense(self.patch_norm1(pixels)))
        table = self.pos_embedding[...].astype(x.dtype)
        _, place = places_of(pixels.shape[1], grid[:, :1], grid[:, 1:2])
        place = jnp.minimum(place, len(table) - 1)
        x = x + table[place[..., 0], 0] + table[place[..., 1], 1]
        return constrain_batch(self.pos_norm(x))


def places_of(
    count: int, columns: Int[Array, "M 1"], rows: Int[Array, "M 1"]
) -> tuple[Int[Array, "M S"], Int[Array, "M S 2"]]:
    """(of which picture of its slot each place is, its column and row there).

    Args:
      count: S, places in a slot.
      columns, rows: int32[M, 1], of every picture of a slot, which lie behind one another, each
        line by line.
    """
    number, columns = jnp.arange(count), jnp.maximum(columns, 1)
    picture, within = jnp.divmod(number, columns * jnp.maximum(rows, 1))
    row, column = jnp.divmod(within, columns)
    return picture, jnp.stack([column, row], axis=-1)
