"""LLaVA-OneVision: tiles shrunk bilinearly to a limit, several images, video frames."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mmpo_jax.models import anyres
from mmpo_jax.models.config import ModelError
from mmpo_jax.models.families import llava, llava_next
from mmpo_jax.models.families.llava import LlavaConfig
from mmpo_jax.models.family import Clip, Family, Images, Size, Videos
from mmpo_jax.models.layout import Layout
from mmpo_jax.models.torch_resize import frame_pixels


@dataclasses.dataclass(frozen=True)
class LlavaOnevisionConfig(LlavaConfig):
    """What it adds to LLaVA-NeXT's."""

    video_token_id: int
    max_tiles: int
    """Pictures of more features than so many tiles have are shrunk."""


def read_config(config: Any) -> LlavaOnevisionConfig:
    limit = re.fullmatch(r"anyres_max_(\d+)", config.vision_aspect_ratio)
    if limit is None:
        raise ModelError(
            f"vision_aspect_ratio is {config.vision_aspect_ratio!r}; this version implements "
            "anyres_max_ with a number"
        )
    return LlavaOnevisionConfig(
        **llava_next.tiled_fields(config),
        video_token_id=config.video_token_id,
        max_tiles=int(limit.group(1)),
    )


def layouts(config: LlavaOnevisionConfig, processor: Any, sizes: Sequence[Size]) -> list[Layout]:
    tower, token = config.vision, config.image_token_id
    if len(sizes) > 1:
        return [anyres.single(token, tower.side) for _ in sizes]
    grids = [anyres.tile_grid(processor, size, tower.image_size) for size in sizes]
    return [
        anyres.tiled(token, size, grid, tower.side, config.max_tiles)
        for size, grid in zip(sizes, grids, strict=True)
    ]


def pixels(config: LlavaOnevisionConfig, processor: Any, images: Sequence[Any]) -> list[np.ndarray]:
    del config
    # In a list of lists, so that the processor knows they belong to one prompt: a single image is
    # tiled, several are padded to squares.
    made = processor(images=[list(images)], return_tensors="np")["pixel_values"]
    return list(np.asarray(made, np.float32))


def video_layouts(
    config: LlavaOnevisionConfig, settings: Mapping[str, Any], clips: Sequence[Clip]
) -> list[Layout]:
    del settings
    return [anyres.video(config.video_token_id, config.vision.side, clip.frames) for clip in clips]


def video_pixels(
    config: LlavaOnevisionConfig, settings: Mapping[str, Any], videos: Sequence[Sequence[Any]]
) -> list[np.ndarray]:
    return [frame_pixels(settings, frames, config.vision.pixel_shape) for frames in videos]


FAMILY = Family(
    model_types=("llava_onevision",),
    read_config=read_config,
    module=llava_next.LlavaNext,
    rules=llava_next.FAMILY.rules,
    read_keys=llava.READ_KEYS,
    write_keys=llava.WRITE_KEYS,
    images=Images(
        processors=("LlavaOnevisionImageProcessor",),
        placeholders=lambda config: (config.image_token_id,),
        slot_shape=lambda config: config.vision.pixel_shape,
        layouts=layouts,
        pixels=pixels,
        sized=True,
        extras=llava_next.LlavaNext.extras,
        vectors=4,
    ),
    videos=Videos(
        placeholder=lambda config, tokenizer: config.video_token_id,
        settings="video_preprocessor_config.json",
        layouts=video_layouts,
        pixels=video_pixels,
    ),
    tensor_shapes=llava.tensor_shapes,
)
