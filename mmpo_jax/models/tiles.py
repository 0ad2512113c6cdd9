"""Vision-language models whose slots are tiles of one size, projected feature by feature."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from mmpo_jax.models.batch import Batch, PackedBatch
from mmpo_jax.models.vision import VisionTower
from mmpo_jax.models.vlm import VisionLanguageModel

TILE_ROWS = 16
"""Rows of bfloat16 in a tile of a TPU's memory. Slots of so many features, or of a multiple, become
rows of a pool as they are; SigLIP's 729 would be moved row by row, in code of a minute to compile.
"""


class TileModel(VisionLanguageModel):
    """Every slot of a prompt is one tile [C, H, W], of which N features stay in their order.

    A family adds its own projector.
    """

    multi_modal_projector: Any
    """Takes each feature alone."""
    extras: int = 0
    """Learned vectors that the pool begins with."""

    def __init__(self, config: Any, rngs: nnx.Rngs):
        """
        Args:
          config: with a `vision` tower, and the N as `num_image_tokens`.
          rngs: of first weights.
        """
        super().__init__(config, rngs)
        self.slot_tokens = config.num_image_tokens
        self.vision_tower = VisionTower(config.vision, rngs)

    @property
    def slot_rows(self) -> int:
        """Rows that a slot takes of the pool: N, and what fills it up to whole tiles of memory."""
        return -(-self.slot_tokens // TILE_ROWS) * TILE_ROWS

    def tile_features(self, pixels: Float[Array, "M C H W"], remat: str) -> Float[Array, "M N D"]:
        """What is projected of tiles."""
        raise NotImplementedError(f"{self.config.family} has no tiles")

    def image_features(self, batch: Batch | PackedBatch, remat: str) -> Float[Array, "B F D"]:
        b, i = batch.pixel_values.shape[:2]
        pixels = batch.pixel_values.reshape(b * i, *batch.pixel_values.shape[2:])
        features = self.tile_features(pixels, remat)
        added = self.slot_rows - self.slot_tokens
        features = self.multi_modal_projector(jnp.pad(features, ((0, 0), (0, added), (0, 0))))
        return features.reshape(b, -1, features.shape[-1])

    def pool_rows(self, index: Int[Array, "B *S K"]) -> Int[Array, "B *S K"]:
        slot, token = jnp.divmod(index - self.extras, self.slot_tokens)
        rows = self.extras + slot * self.slot_rows + token
        return jnp.where(index < self.extras, index, rows)
