"""Qwen3-VL: outputs of early layers of the tower reach the decoder's first layers (DeepStack), and
the time of a video's frames is said in text between them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from flax import nnx

from mmpo_jax.models import decoder, patch_merger, qwen_media, vision_qwen
from mmpo_jax.models.config import expect, read_decoder
from mmpo_jax.models.family import Clip, Family, Size, Videos
from mmpo_jax.models.frame_sampling import FRAME_RATE, from_end_to_end
from mmpo_jax.models.layout import Layout
from mmpo_jax.models.media_limits import PictureSizeError, VideoLengthError, size_text
from mmpo_jax.models.qwen_media import QwenVLConfig
from mmpo_jax.models.torch_resize import frame_size
from mmpo_jax.models.vision_qwen import read_deep_vision
from mmpo_jax.models.vlm import VisionLanguageModel

SECTIONS = (24, 20, 20)
"""transformers' rotary sections where a config has none."""

VIDEO_DEFAULTS: dict[str, Any] = {
    "size": {"shortest_edge": 128 * 32**2, "longest_edge": 768 * 32**2},
    "image_mean": [0.5] * 3,
    "image_std": [0.5] * 3,
    "patch_size": 16,
    "max_video_tokens": 768,
}
"""What transformers takes for settings that the video processor's file leaves out; `size` limits
the pixels of all frames together."""

MARKS = {"vision_start_token": "<|vision_start|>", "vision_end_token": "<|vision_end|>"}
"""Tokens around every frame, where the tokenizer names no others."""


def read_config(config: Any) -> QwenVLConfig:
    """
    Raises:
      ModelError: a switch that is not implemented, or parts that do not fit together.
    """
    # transformers reads no window from such a config, where `read_decoder` would.
    expect(getattr(config.text_config, "sliding_window", None), (None,), "sliding_window")
    text = read_decoder(config.text_config, config.tie_word_embeddings)
    qwen_media.check_width(config)
    return QwenVLConfig(
        family=config.model_type,
        decoder=qwen_media.with_sections(text, SECTIONS, interleaved=True),
        vision=read_deep_vision(config.vision_config),
        image_token_id=config.image_token_id,
        video_token_id=config.video_token_id,
    )


class Qwen3VL(VisionLanguageModel):
    """Every slot is a group of patches; squares of them become a feature on every level."""

    def __init__(self, config: QwenVLConfig, rngs: nnx.Rngs):
        super().__init__(config, rngs)
        self.levels = len(config.vision.deep_layers)
        self.vision_tower = vision_qwen.QwenVisionTower(config.vision, rngs)
        self.multi_modal_projector = patch_merger.DeepMerger(
            config.vision, config.decoder.hidden_size, rngs
        )

    def image_features(self, batch, remat):
        last, deep = self.vision_tower(batch.pixel_values, batch.patches, remat)
        return self.multi_modal_projector.levels(last, deep)


def video_layouts(
    config: QwenVLConfig, settings: Mapping[str, Any], clips: Sequence[Clip]
) -> list[Layout]:
    made = []
    depth = config.vision.temporal_patch_size
    for clip in clips:
        size = _frame_size(config, settings, clip.frames, clip.size)
        grid = qwen_media.grid_of(config, clip.frames, size)
        plain = qwen_media.layout(config, config.video_token_id, grid, np.zeros(grid[0], np.int32))
        rate = clip.rate or FRAME_RATE
        seconds = [*(clip.times or (frame / rate for frame in range(clip.frames)))]
        seconds += seconds[-1:] * (-clip.frames % depth)
        # Half of the way from the first to the last frame of each patch.
        firsts, lasts = seconds[::depth], seconds[depth - 1 :: depth]
        times = tuple((first + last) / 2 for first, last in zip(firsts, lasts, strict=True))
        made.append(dataclasses.replace(plain, times=times))
    return made


def video_pixels(
    config: QwenVLConfig, settings: Mapping[str, Any], clips: Sequence[Sequence[Any]]
) -> list[np.ndarray]:
    """
    Raises:
      DataError: the frames of a video are not of one size, or there are too few.
    """
    processor = qwen_media.frame_processor(config, settings, VIDEO_DEFAULTS)
    made = []
    for clip in clips:
        size = _frame_size(config, settings, len(clip), frame_size(clip))
        made.append(qwen_media.clip_pixels(config, processor, clip, size))
    return made


def _frame_size(config: QwenVLConfig, settings: Mapping[str, Any], frames: int, size: Size) -> Size:
    """Height and width that the frames of a video are resized to: whole tokens, so that all frames
    together have an area between two limits.

    Raises:
      DataError: there are too few frames, or they are too narrow.
    """
    known = {**VIDEO_DEFAULTS, **{key: x for key, x in settings.items() if x is not None}}
    least, most = known["size"]["shortest_edge"], known["size"]["longest_edge"]
    edge, depth = config.edge, config.vision.temporal_patch_size
    if known.get("cap_pixels_per_frame"):
        share = min(known["max_video_tokens"] * edge**2, most // frames)
        most = max(share, int(1.05 * least)) * frames
    if frames < depth:
        raise VideoLengthError(f"a video of {frames} frames; this model takes {depth} or more")
    height, width = size
    if min(size) < edge:
        scale = max(edge / height, edge / width)
        height, width = int(height * scale), int(width * scale)
    if max(height, width) > 200 * min(height, width):
        raise PictureSizeError(f"{size_text(size)}: one side is over 200 times the other")
    area = frames * height * width
    whole = [round(side / edge) * edge for side in (height, width)]
    rounded = round(frames / depth) * depth * math.prod(whole)
    if rounded > most:
        shrink = math.sqrt(area / most)
        whole = [max(edge, math.floor(side / shrink / edge) * edge) for side in (height, width)]
    elif rounded < least:
        grow = math.sqrt(least / area)
        whole = [math.ceil(side * grow / edge) * edge for side in (height, width)]
    return whole[0], whole[1]


def frame_video(tokenizer: Any, layout: Layout) -> Layout:
    """Every time step behind its time in seconds, between the tokens for pictures.

    The chat template writes the same two around the whole video. Times are tokenized as they stand
    in the prompt, between two special tokens.
    """
    start, end = (getattr(tokenizer, name, None) or token for name, token in MARKS.items())
    ids: list[int] = []
    for seconds, features in zip(
        layout.times, np.split(layout.ids, len(layout.times)), strict=True
    ):
        marked = f"{end}<{seconds:.1f} seconds>{start}"
        said = tokenizer(marked, add_special_tokens=False)["input_ids"][1:]
        ids += [*said, *features, tokenizer.convert_tokens_to_ids(end)]
    return dataclasses.replace(layout, ids=np.array(ids, np.int32))


READ_KEYS = (
    (r"^model\.visual\.pos_embed\.", "vision_tower.position_embedding."),
    (r"^model\.visual\.deepstack_merger_list\.", "multi_modal_projector.deepstack.layers."),
    (r"^model\.visual\.merger\.", "multi_modal_projector."),
    (r"^(multi_modal_projector\..*)linear_fc", r"\1linear_"),
    *qwen_media.READ_KEYS,
    (r"^(vision_tower\..*\.mlp\.)linear_fc", r"\1fc"),
)
WRITE_KEYS = (
    (r"^(vision_tower\..*\.mlp\.)fc", r"\1linear_fc"),
    *qwen_media.WRITE_KEYS,
    (r"^vision_tower\.position_embedding\.", "visual.pos_embed."),
    (r"^(multi_modal_projector\..*)linear_", r"\1linear_fc"),
    (r"^multi_modal_projector\.deepstack\.layers\.", "visual.deepstack_merger_list."),
    (r"^multi_modal_projector\.", "visual.merger."),
    (r"^(visual|language_model)\.", r"model.\1."),
)

FAMILY = Family(
    model_types=("qwen3_vl",),
    read_config=read_config,
    module=Qwen3VL,
    rules=(
        *vision_qwen.SHARDING_RULES,
        *patch_merger.SHARDING_RULES,
        *decoder.SHARDING_RULES,
    ),
    read_keys=READ_KEYS,
    write_keys=WRITE_KEYS,
    module_keys=(),  # names of files are those of modules
    images=qwen_media.IMAGES,
    videos=Videos(
        placeholder=lambda config, tokenizer: config.video_token_id,
        settings="video_preprocessor_config.json",
        layouts=video_layouts,
        pixels=video_pixels,
        frame=frame_video,
        sample=from_end_to_end,
    ),
    tensor_shapes=lambda config: {
        "model.visual.patch_embed.proj.weight": qwen_media.patch_shape(config.vision)
    },
)
