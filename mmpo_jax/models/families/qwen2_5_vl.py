"""Qwen2.5-VL: most layers of the tower in windows, and a video's time in the positions.

The vision tower's windows are squares of tokens, cut off at the right and lower edge; slots of the
size of a whole window are filled with as many of them as they hold.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from flax import nnx

from mmpo_jax.models import decoder, patch_merger, qwen_media, vision_qwen
from mmpo_jax.models.config import read_decoder
from mmpo_jax.models.family import Clip, Family, Size, Videos
from mmpo_jax.models.frame_sampling import FRAME_RATE, whole_patches
from mmpo_jax.models.layout import Layout
from mmpo_jax.models.qwen_media import QwenVLConfig
from mmpo_jax.models.torch_resize import frame_size
from mmpo_jax.models.vision_qwen import read_vision
from mmpo_jax.models.vlm import VisionLanguageModel

SECTIONS = (16, 24, 24)
"""transformers' rotary sections where a config has none."""

VIDEO_SIZE = {"shortest_edge": 128 * 28**2, "longest_edge": 768 * 28**2}
"""transformers' limits of a frame's pixels where the files have none."""

VIDEO_TOKENS = 128_000
"""transformers' limit of a video's tokens where the files have none."""


@dataclasses.dataclass(frozen=True)
class Qwen25VLConfig(QwenVLConfig):
    """Qwen2.5-VL's own switches."""

    tokens_per_second: int
    """Positions per second of a video."""


def read_config(config: Any) -> Qwen25VLConfig:
    """
    Raises:
      ModelError: a switch that is not implemented, or parts that do not fit together.
    """
    text = read_decoder(config.text_config, config.tie_word_embeddings)
    qwen_media.check_width(config)
    return Qwen25VLConfig(
        family=config.model_type,
        decoder=qwen_media.with_sections(text, SECTIONS),
        vision=read_vision(config.vision_config),
        image_token_id=config.image_token_id,
        video_token_id=config.video_token_id,
        tokens_per_second=config.vision_config.tokens_per_second,
    )


class Qwen25VL(VisionLanguageModel):
    """Every slot is a group of patches; squares of them become one feature."""

    def __init__(self, config: Qwen25VLConfig, rngs: nnx.Rngs):
        super().__init__(config, rngs)
        self.vision_tower = vision_qwen.QwenVisionTower(config.vision, rngs)
        self.multi_modal_projector = patch_merger.PatchMerger(
            config.vision, config.decoder.hidden_size, rngs
        )

    def image_features(self, batch, remat):
        states, _ = self.vision_tower(batch.pixel_values, batch.patches, remat)
        return self.multi_modal_projector(states)


def video_layouts(
    config: Qwen25VLConfig, settings: dict[str, Any], clips: Sequence[Clip]
) -> list[Layout]:
    made = []
    for clip in clips:
        size = _frame_size(config, settings, clip.frames, clip.size)
        grid = qwen_media.grid_of(config, clip.frames, size)
        seconds = config.vision.temporal_patch_size / (clip.rate or FRAME_RATE)
        # In float32, as transformers does: positions are rounded down.
        interval = np.float32(config.tokens_per_second) * np.float32(seconds)
        times = (np.arange(grid[0], dtype=np.float32) * interval).astype(np.int32)
        made.append(qwen_media.layout(config, config.video_token_id, grid, times))
    return made


def video_pixels(
    config: Qwen25VLConfig, settings: dict[str, Any], clips: Sequence[Sequence[Any]]
) -> list[np.ndarray]:
    """
    Raises:
      DataError: the frames of a video are not of one size.
    """
    processor = qwen_media.frame_processor(config, settings, {})
    sizes = [_frame_size(config, settings, len(clip), frame_size(clip)) for clip in clips]
    return [
        qwen_media.clip_pixels(config, processor, clip, size)
        for clip, size in zip(clips, sizes, strict=True)
    ]


def _frame_size(config: Qwen25VLConfig, settings: dict[str, Any], frames: int, size: Size) -> Size:
    """Height and width that the frames of a video are resized to."""
    limits = dict(settings.get("size") or VIDEO_SIZE)
    least = settings.get("min_pixels") or limits["shortest_edge"]
    most = settings.get("max_pixels") or limits["longest_edge"]
    if settings.get("cap_pixels_per_frame"):
        tokens = settings.get("max_video_tokens", VIDEO_TOKENS)
        pixels = int(tokens * config.edge**2 * 0.9)
        share = pixels * config.vision.temporal_patch_size // frames
        most = max(min(most, share), int(least * 1.05))
    return qwen_media.fitted(config, size, least, most)


READ_KEYS = (
    (r"^(model\.)?visual\.merger\.ln_q\.", "multi_modal_projector.norm."),
    (r"^(model\.)?visual\.merger\.mlp\.0\.", "multi_modal_projector.linear_1."),
    (r"^(model\.)?visual\.merger\.mlp\.2\.", "multi_modal_projector.linear_2."),
    *qwen_media.READ_KEYS,
)
WRITE_KEYS = (
    *qwen_media.WRITE_KEYS,
    (r"^multi_modal_projector\.norm\.", "visual.merger.ln_q."),
    (r"^multi_modal_projector\.linear_1\.", "visual.merger.mlp.0."),
    (r"^multi_modal_projector\.linear_2\.", "visual.merger.mlp.2."),
    (r"^language_model\.", "model."),
)
MODULE_KEYS = ((r"^model\.", "model.language_model."), (r"^visual\.", "model.visual."))


FAMILY = Family(
    model_types=("qwen2_5_vl",),
    read_config=read_config,
    module=Qwen25VL,
    rules=(
        *vision_qwen.SHARDING_RULES,
        *patch_merger.SHARDING_RULES,
        *decoder.SHARDING_RULES,
    ),
    read_keys=READ_KEYS,
    write_keys=WRITE_KEYS,
    module_keys=MODULE_KEYS,
    images=qwen_media.IMAGES,
    videos=Videos(
        placeholder=lambda config, tokenizer: config.video_token_id,
        settings="video_preprocessor_config.json",
        layouts=video_layouts,
        pixels=video_pixels,
        sample=whole_patches,
    ),
    tensor_shapes=lambda config: {
        "visual.patch_embed.proj.weight": qwen_media.patch_shape(config.vision)
    },
)
