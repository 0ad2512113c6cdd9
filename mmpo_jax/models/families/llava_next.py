"""LLaVA-NeXT (LLaVA-1.6): LLaVA-1.5 over images of any resolution, cut into tiles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec

from mmpo_jax.models import anyres
from mmpo_jax.models.config import ModelError
from mmpo_jax.models.families import llava
from mmpo_jax.models.families.llava import Llava, LlavaConfig
from mmpo_jax.models.family import Family, Images, Size, pixels_of_each
from mmpo_jax.models.layout import Layout


def read_config(config: Any) -> LlavaConfig:
    return LlavaConfig(**tiled_fields(config))


def tiled_fields(config: Any) -> dict[str, Any]:
    """Fields as of `llava.llava_fields`, where the features of a tile must form a square.

    Raises:
      ModelError: an architecture or a switch that is not implemented.
    """
    fields = llava.llava_fields(config)
    if fields["keep_first"] == fields["vision"].class_token:
        raise ModelError(
            f"vision_feature_select_strategy is {config.vision_feature_select_strategy!r}; tiles "
            "need 'default' for towers with a class token (CLIP) and 'full' for those without"
        )
    return fields


class LlavaNext(Llava):
    """Every slot is a tile or a small copy of the whole; the pool begins with the newline."""

    extras = 1

    def __init__(self, config: LlavaConfig, rngs: nnx.Rngs):
        super().__init__(config, rngs)
        size = config.decoder.hidden_size
        init = nnx.initializers.normal(size**-0.5)
        self.image_newline = nnx.Param(init(rngs.params(), (size,)))

    def image_features(self, batch, remat):
        features = super().image_features(batch, remat)
        newline = self.image_newline[...].astype(features.dtype)
        newline = jnp.broadcast_to(newline, (len(features), 1, features.shape[-1]))
        return jnp.concatenate([newline, features], axis=1)


def layouts(config: LlavaConfig, processor: Any, sizes: Sequence[Size]) -> list[Layout]:
    tower, token = config.vision, config.image_token_id
    grids = [anyres.tile_grid(processor, size, tower.image_size) for size in sizes]
    return [
        anyres.tiled(token, size, grid, tower.side) for size, grid in zip(sizes, grids, strict=True)
    ]


def pixels(config: LlavaConfig, processor: Any, images: Sequence[Any]) -> list[np.ndarray]:
    del config
    return [made[0] for made in pixels_of_each(processor, images)]


FAMILY = Family(
    model_types=("llava_next",),
    read_config=read_config,
    module=LlavaNext,
    rules=(*llava.FAMILY.rules, (r"image_newline", PartitionSpec())),
    read_keys=llava.READ_KEYS,
    write_keys=llava.WRITE_KEYS,
    images=Images(
        processors=("LlavaNextImageProcessor",),
        placeholders=lambda config: (config.image_token_id,),
        slot_shape=lambda config: config.vision.pixel_shape,
        layouts=layouts,
        pixels=pixels,
        sized=True,
        extras=LlavaNext.extras,
    ),
    tensor_shapes=llava.tensor_shapes,
)
