"""Qwen2.5-VL: images and videos of any size, and positions of time, row and column.

Sizes follow the picture: it is resized to a whole number of tokens, each a square of patches. The
vision tower's windows are squares of tokens, cut off at the right and lower edge; slots of the
size of a whole window are filled with as many of them as they hold.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import transformers
from flax import nnx
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from mmpo_jax.core.errors import DataError
from mmpo_jax.models import decoder, vision_qwen
from mmpo_jax.models.config import (
    DecoderConfig,
    ModelConfig,
    ModelError,
    read_decoder,
    with_rope,
)
from mmpo_jax.models.family import Clip, Family, Images, Size, Videos
from mmpo_jax.models.layout import Layout
from mmpo_jax.models.torch_resize import FrameBackend
from mmpo_jax.models.vision_qwen import QwenVisionConfig, read_vision
from mmpo_jax.models.vlm import VisionLanguageModel

Grid = tuple[int, int, int]
"""(time steps, rows, columns) of tokens."""

SECTIONS = (16, 24, 24)
"""transformers' rotary sections where a config has none."""

VIDEO_SIZE = {"shortest_edge": 128 * 28**2, "longest_edge": 768 * 28**2}
"""transformers' limits of a frame's pixels where the files have none."""

VIDEO_TOKENS = 128_000
"""transformers' limit of a video's tokens where the files have none."""

FRAME_SETTINGS = (
    "do_normalize",
    "do_rescale",
    "do_resize",
    "image_mean",
    "image_std",
    "merge_size",
    "patch_size",
    "resample",
    "rescale_factor",
)
"""Settings that a video processor shares with the image processor."""

FRAME_RATE = 24.0
"""What transformers takes frames of unknown rate to be."""


@dataclasses.dataclass(frozen=True)
class Qwen25VLConfig(ModelConfig):
    """Qwen2.5-VL's own switches."""

    vision: QwenVisionConfig
    image_token_id: int
    video_token_id: int
    tokens_per_second: int
    """Positions per second of a video."""


def read_config(config: Any) -> Qwen25VLConfig:
    """
    Raises:
      ModelError: a switch that is not implemented, or parts that do not fit together.
    """
    text = _with_sections(read_decoder(config.text_config, config.tie_word_embeddings))
    width = config.vision_config.out_hidden_size
    if width != text.hidden_size:
        raise ModelError(
            f"vision_config.out_hidden_size is {width}, text_config.hidden_size {text.hidden_size}"
        )
    return Qwen25VLConfig(
        family=config.model_type,
        decoder=text,
        vision=read_vision(config.vision_config),
        image_token_id=config.image_token_id,
        video_token_id=config.video_token_id,
        tokens_per_second=config.vision_config.tokens_per_second,
    )


def _with_sections(text: DecoderConfig) -> DecoderConfig:
    attention = text.attentions[0]  # they are alike but for windows
    sections = attention.rope.sections or SECTIONS
    if len(sections) != 3 or 2 * sum(sections) != attention.head_dim:
        raise ModelError(
            f"text_config.rope_parameters.mrope_section is {list(sections)}, expected three "
            f"numbers that add up to half of a head's {attention.head_dim} channels"
        )
    return with_rope(text, dataclasses.replace(attention.rope, sections=sections))


class Qwen25VL(VisionLanguageModel):
    """Every slot is a group of patches; squares of them become one feature."""

    def __init__(self, config: Qwen25VLConfig, rngs: nnx.Rngs):
        super().__init__(config, rngs)
        self.vision_tower = vision_qwen.QwenVisionTower(config.vision, rngs)
        self.multi_modal_projector = vision_qwen.PatchMerger(
            config.vision, config.decoder.hidden_size, rngs
        )

    def image_features(self, batch, remat):
        places, frames = batch.patches["places"], batch.patches["frames"]
        return self.multi_modal_projector(
            self.vision_tower(batch.pixel_values, places, frames, remat)
        )


def layouts(config: Qwen25VLConfig, processor: Any, sizes: Sequence[Size]) -> list[Layout]:
    grids = [_grid(config, processor, 1, size) for size in sizes]
    return [_layout(config, config.image_token_id, grid) for grid in grids]


def video_layouts(
    config: Qwen25VLConfig, settings: dict[str, Any], clips: Sequence[Clip]
) -> list[Layout]:
    made = []
    for frames, height, width, rate in clips:
        processor = _frame_processor(config, settings, frames)
        grid = _grid(config, processor, frames, (height, width))
        seconds = config.vision.temporal_patch_size / (rate or FRAME_RATE)
        made.append(_layout(config, config.video_token_id, grid, seconds))
    return made


def _grid(config: Qwen25VLConfig, processor: Any, frames: int, size: Size) -> Grid:
    """The tokens of an image or video after resizing.

    Raises:
      ModelError: the image processor does not resize, or not to whole tokens.
      DataError: the image is too narrow.
    """
    tower = config.vision
    expected = {"merge_size": tower.merge_size, "patch_size": tower.patch_size, "do_resize": True}
    actual = {name: getattr(processor, name) for name in expected}
    if actual != expected:
        raise ModelError(f"preprocessor_config.json has {actual}, config.json needs {expected}")
    edge = tower.patch_size * tower.merge_size
    limits = processor.size.shortest_edge, processor.size.longest_edge
    try:
        height, width = smart_resize(*size, edge, *limits)
    except ValueError as error:
        raise DataError(f"{size[1]} x {size[0]} pixels: {error}") from error
    return -(-frames // tower.temporal_patch_size), height // edge, width // edge


def _layout(config: Qwen25VLConfig, token: int, grid: Grid, seconds: float = 0.0) -> Layout:
    """Tokens row by row, the time steps so many seconds apart."""
    places, slots = _pack(grid, config.vision.window)
    time, row, column = np.indices(grid, np.int32).reshape(3, -1)
    # In float32, as transformers does: positions are rounded down.
    interval = np.float32(config.tokens_per_second) * np.float32(seconds)
    time = (time.astype(np.float32) * interval).astype(np.int32)
    plain = Layout.plain(token, len(places), slots)
    return dataclasses.replace(
        plain,
        index=places[:, None],
        features=slots * config.vision.slot_tokens,
        steps=np.stack([time, row, column]),
        # As transformers has it since 5.3; before, and in the paper, time counted too.
        span=max(grid[1:]),
    )


@functools.lru_cache(maxsize=512)
def _pack(grid: Grid, window: int) -> tuple[np.ndarray, int]:
    """Where each token of a grid goes among slots that hold whole windows.

    Args:
      grid: t, h and w.
      window: tokens along the side of a window, whose square is a slot's size.

    Returns:
      (int32[t*h*w], the number of slots); the tokens of a window are contiguous.
    """
    _, height, width = grid
    time, row, column = np.indices(grid, np.int32).reshape(3, -1)
    windows = (time * -(-height // window) + row // window) * -(-width // window)
    windows += column // window
    sizes = np.bincount(windows)
    starts = np.zeros_like(sizes)
    # Whole windows fill a slot; the cut ones go, the largest first, where there is room.
    whole = np.flatnonzero(sizes == window**2)
    starts[whole] = np.arange(len(whole)) * window**2
    slots, room = len(whole), list[int]()
    for index in np.argsort(-sizes, kind="stable")[len(whole) :]:
        slot = next((s for s, left in enumerate(room) if left >= sizes[index]), len(room))
        if slot == len(room):
            room.append(window**2)
        starts[index] = (slots + slot + 1) * window**2 - room[slot]
        room[slot] -= sizes[index]
    order = np.argsort(windows, kind="stable")
    within = np.empty_like(windows)
    within[order] = np.arange(len(windows)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return (starts[windows] + within).astype(np.int32), slots + len(room)


def describe(config: Qwen25VLConfig, media: Sequence[Layout], slots: int) -> dict[str, np.ndarray]:
    """What the tower wants to know of every patch, see `QwenVisionTower`."""
    tower = config.vision
    merge, tokens = tower.merge_size, tower.slot_tokens
    places = np.zeros((slots * tokens, merge, merge, 2), np.int32)
    frames = np.zeros(slots * tokens, np.int32)
    start = seen = 0
    for layout in media:
        assert layout.steps is not None
        at = start + layout.index[:, 0]
        row, column = layout.steps[1:]
        number = np.arange(len(at)) // ((row.max() + 1) * (column.max() + 1))
        frames[at] = seen + 1 + number
        places[at] = merge * layout.steps[1:].T[:, None, None]
        start, seen = start + layout.features, seen + number[-1] + 1
    places += np.moveaxis(np.indices((merge, merge)), 0, -1)
    return {
        "places": places.reshape(slots, tower.slot_patches, 2),
        "frames": np.repeat(frames, merge**2).reshape(slots, tower.slot_patches),
    }


def pixels(config: Qwen25VLConfig, processor: Any, images: Sequence[Any]) -> list[np.ndarray]:
    made = []
    for image in images:
        grid = _grid(config, processor, 1, (image.height, image.width))
        values = processor(images=image, return_tensors="np")["pixel_values"]
        made.append(_in_slots(config, values, grid))
    return made


def video_pixels(
    config: Qwen25VLConfig, settings: dict[str, Any], clips: Sequence[Sequence[Any]]
) -> list[np.ndarray]:
    """
    Raises:
      DataError: the frames of a video are not of one size.
    """
    depth, edge = config.vision.temporal_patch_size, config.vision.patch_size
    made = []
    for clip in clips:
        sizes = {(frame.height, frame.width) for frame in clip}
        if len(sizes) > 1:
            raise DataError(f"the frames of a video have different sizes: {sorted(sizes)}")
        processor = _frame_processor(config, settings, len(clip))
        grid = _grid(config, processor, len(clip), *sizes)
        padded = [*clip, *[clip[-1]] * (-len(clip) % depth)]
        values = processor(images=padded, return_tensors="np")["pixel_values"]
        # A patch is cut from `depth` frames, after its channels and before its pixels.
        values = values.reshape(grid[0], depth, -1, config.vision.num_channels, edge**2)
        made.append(_in_slots(config, values.transpose(0, 2, 3, 1, 4), grid))
    return made


class _Frames(transformers.Qwen2VLImageProcessorPil, FrameBackend):  # type: ignore[misc]
    """transformers' image processor with the resizing of its video processor."""


def _frame_processor(config: Qwen25VLConfig, settings: dict[str, Any], frames: int) -> Any:
    """What treats single frames as transformers' video processor does."""
    size = dict(settings.get("size") or VIDEO_SIZE)
    size["shortest_edge"] = settings.get("min_pixels") or size["shortest_edge"]
    size["longest_edge"] = settings.get("max_pixels") or size["longest_edge"]
    if settings.get("cap_pixels_per_frame"):
        tower = config.vision
        tokens = settings.get("max_video_tokens", VIDEO_TOKENS)
        pixels = int(tokens * (tower.patch_size * tower.merge_size) ** 2 * 0.9)
        share = pixels * tower.temporal_patch_size // frames
        floor = int(size["shortest_edge"] * 1.05)
        size["longest_edge"] = max(min(size["longest_edge"], share), floor)
    kept = {name: settings[name] for name in FRAME_SETTINGS if name in settings}
    return _Frames(**kept, size=size, temporal_patch_size=1)


def _in_slots(config: Qwen25VLConfig, patches: np.ndarray, grid: Grid) -> np.ndarray:
    """float32[slots, S, C*t*h*w] of patches in the order of the tokens that they become.

    Raises:
      ModelError: the patches are of another size than the model's.
    """
    tower = config.vision
    places, slots = _pack(grid, tower.window)
    width = tower.merge_size**2 * tower.patch_inputs
    if patches.size != len(places) * width:
        raise ModelError(
            f"the image processor makes {patches.size // len(places)} numbers for a token, "
            f"config.json says {width}"
        )
    made = np.zeros((slots * tower.slot_tokens, width), np.float32)
    made[places] = patches.reshape(len(places), -1)
    return made.reshape(slots, tower.slot_patches, tower.patch_inputs)


READ_KEYS = (
    (r"^(model\.)?visual\.patch_embed\.proj\.", "vision_tower.patch_embedding."),
    (r"^(model\.)?visual\.blocks\.", "vision_tower.layers."),
    (r"^(model\.)?visual\.merger\.ln_q\.", "multi_modal_projector.norm."),
    (r"^(model\.)?visual\.merger\.mlp\.0\.", "multi_modal_projector.linear_1."),
    (r"^(model\.)?visual\.merger\.mlp\.2\.", "multi_modal_projector.linear_2."),
    (r"^model\.(language_model\.)?", "language_model."),
    (r"^lm_head\.", "language_model.lm_head."),
)
WRITE_KEYS = (
    (r"^vision_tower\.patch_embedding\.", "visual.patch_embed.proj."),
    (r"^vision_tower\.layers\.", "visual.blocks."),
    (r"^multi_modal_projector\.norm\.", "visual.merger.ln_q."),
    (r"^multi_modal_projector\.linear_1\.", "visual.merger.mlp.0."),
    (r"^multi_modal_projector\.linear_2\.", "visual.merger.mlp.2."),
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^language_model\.", "model."),
)
MODULE_KEYS = ((r"^model\.", "model.language_model."), (r"^visual\.", "model.visual."))


def tensor_shapes(config: Qwen25VLConfig) -> dict[str, tuple[int, ...]]:
    tower = config.vision
    patch = tower.temporal_patch_size, tower.patch_size, tower.patch_size
    return {"visual.patch_embed.proj.weight": (tower.hidden_size, tower.num_channels, *patch)}


FAMILY = Family(
    model_types=("qwen2_5_vl",),
    read_config=read_config,
    module=Qwen25VL,
    rules=(*vision_qwen.SHARDING_RULES, *decoder.SHARDING_RULES),
    read_keys=READ_KEYS,
    write_keys=WRITE_KEYS,
    module_keys=MODULE_KEYS,
    images=Images(
        processors=("Qwen2VLImageProcessor",),
        placeholders=lambda config: (config.image_token_id,),
        slot_shape=lambda config: (config.vision.slot_patches, config.vision.patch_inputs),
        layouts=layouts,
        pixels=pixels,
        sized=True,
        describe=describe,
    ),
    videos=Videos(
        placeholder=lambda config, tokenizer: config.video_token_id,
        settings="video_preprocessor_config.json",
        layouts=video_layouts,
        pixels=video_pixels,
    ),
    tensor_shapes=tensor_shapes,
)
