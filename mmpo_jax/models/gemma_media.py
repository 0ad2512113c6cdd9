"""Images and videos of Gemma 4: of any shape, resized to as many squares as there are tokens for.

A slot has room for an image. Frames of a video have fewer tokens than an image, and as many of them
lie one behind the other in a slot as there is room for; in front of each the prompt says when it
is.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import transformers
from jaxtyping import Float

from mmpo_jax.models.config import ModelConfig, ModelError, expect
from mmpo_jax.models.family import Clip, Size
from mmpo_jax.models.frame_sampling import FRAME_RATE
from mmpo_jax.models.layout import Layout
from mmpo_jax.models.media_limits import PictureSizeError, size_text
from mmpo_jax.models.torch_resize import frame_size, resize
from mmpo_jax.models.vision_gemma import GemmaVisionConfig
from mmpo_jax.models.vision_squares import SquaresConfig

VIDEO = "<|video|>"
"""What chat templates write for a video."""
FIRST = "00:00"
"""When the first frame of every video is."""

VIDEO_FILE = "video_preprocessor_config.json"
VIDEO_DEFAULTS: dict[str, Any] = {
    "do_resize": True,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.0] * 3,
    "image_std": [1.0] * 3,
    "resample": 3,  # bicubic
    "num_frames": 32,
    "do_sample_frames": True,
    "patch_size": 16,
    "pooling_kernel_size": 3,
    "max_soft_tokens": 70,
}
"""What transformers takes for settings that the video processor's file leaves out."""

SOFT_TOKENS_OF_FRAMES = (70, 140, 280, 560, 1120)
"""Tokens of a frame at most, as transformers' video processors let one choose."""


@dataclasses.dataclass(frozen=True)
class GemmaMediaConfig(ModelConfig):
    """What the families' configs have in common."""

    vision: GemmaVisionConfig | SquaresConfig
    image_token_id: int
    video_token_id: int

    @property
    def edge(self) -> int:
        """Pixels along the square that becomes one token."""
        return self.vision.pool * self.vision.patch_size


def grid_of(square: int, tokens: int, size: Size) -> tuple[int, int]:
    """Columns and rows of squares that a picture becomes: as many as there are tokens for, in about
    its own shape.

    Args:
      square: pixels along the edge of one.
      tokens: squares at most.
      size: of the picture.

    Raises:
      DataError: it is too long and narrow.
    """
    height, width = size
    factor = math.sqrt(tokens * square**2 / (height * width))
    columns, rows = (math.floor(factor * edge / square) for edge in (width, height))
    if not rows and not columns:
        raise PictureSizeError(f"{size_text((height, width))} are too few for {tokens} tokens")
    if not rows:
        rows, columns = 1, min(width // height, tokens)
    elif not columns:
        columns, rows = 1, min(height // width, tokens)
    return columns, rows


def layouts(config: GemmaMediaConfig, processor: Any, sizes: Sequence[Size]) -> list[Layout]:
    tokens, made = processor.max_soft_tokens, []
    for size in sizes:
        columns, rows = grid_of(config.edge, tokens, size)
        layout = Layout.plain(config.image_token_id, columns * rows)
        row, column = np.divmod(np.arange(columns * rows, dtype=np.int32), columns)
        steps = np.stack([np.zeros_like(row), row, column])
        made.append(dataclasses.replace(layout, features=tokens, steps=steps))
    return made


def video_layouts(
    config: GemmaMediaConfig, settings: Mapping[str, Any], clips: Sequence[Clip]
) -> list[Layout]:
    made, room = [], settings["slot_tokens"]
    for clip in clips:
        columns, rows = grid_of(config.edge, settings["max_soft_tokens"], clip.size)
        tokens = columns * rows
        frame, within = np.divmod(np.arange(clip.frames * tokens, dtype=np.int32), tokens)
        slot, place = np.divmod(frame, room // tokens)
        slots = int(slot[-1]) + 1
        index = (slot * room + place * tokens + within)[:, None]
        rate = clip.rate or FRAME_RATE
        times = clip.times or tuple(number / rate for number in range(clip.frames))
        if times[0]:  # the seconds that a row cuts out of a file are a video of their own
            times = tuple(round(seconds - times[0], 6) for seconds in times)
        made.append(
            Layout(
                ids=np.full(len(index), config.video_token_id, np.int32),
                index=index,
                weight=np.ones(index.shape, np.float32),
                slots=slots,
                features=slots * room,
                steps=np.stack([frame, *np.divmod(within, columns)]),
                times=times,
            )
        )
    return made


def describe(
    config: GemmaMediaConfig, media: Sequence[Layout], slots: int
) -> dict[str, np.ndarray]:
    """Of every slot the columns and rows of squares of its pictures, and how many these are."""
    del config
    grid = np.zeros((slots, 3), np.int32)
    first = 0
    for layout in media:
        assert layout.steps is not None
        frames, rows, columns = 1 + layout.steps.max(axis=1)
        room = layout.features // layout.slots // (rows * columns)
        for number in range(layout.slots):
            grid[first + number] = columns, rows, min(room, frames - number * room)
        first += layout.slots
    return {"grid": grid}


def check_processor(config: GemmaMediaConfig, processor: Any) -> None:
    """
    Raises:
      ModelError: it makes other patches than the tower takes, or none.
    """
    made = {name: getattr(processor, name) for name in ("do_resize", *_sizes(config))}
    _check_patches(config, made, "preprocessor_config.json")


def read_video_settings(
    config: GemmaMediaConfig, settings: Mapping[str, Any], processor: Any
) -> dict[str, Any]:
    """A video processor's settings, and beside them `slot_tokens`, of how many a slot has room.

    Args:
      config: of the model.
      settings: as the file has them.
      processor: the image processor, whose images fill a slot.

    Raises:
      ModelError: it makes other patches than the tower takes, or a frame has no room in a slot.
    """
    known = VIDEO_DEFAULTS | {key: x for key, x in settings.items() if x is not None}
    _check_patches(config, known, VIDEO_FILE)
    tokens, room = known["max_soft_tokens"], processor.max_soft_tokens
    expect(tokens, SOFT_TOKENS_OF_FRAMES, f"{VIDEO_FILE}: max_soft_tokens")
    if tokens > room:
        raise ModelError(
            f"{VIDEO_FILE}: max_soft_tokens is {tokens}, and that of preprocessor_config.json "
            f"{room}; this version implements frames of no more tokens than images have"
        )
    return known | {"slot_tokens": room}


def _sizes(config: GemmaMediaConfig) -> dict[str, int]:
    """Settings of processors that a config decides about."""
    vision = config.vision
    return {"patch_size": vision.patch_size, "pooling_kernel_size": vision.pool}


def _check_patches(config: GemmaMediaConfig, settings: Mapping[str, Any], file: str) -> None:
    expect(settings["do_resize"], (True,), f"{file}: do_resize")
    for name, size in _sizes(config).items():
        expect(settings[name], (size,), f"{file}: {name}")


def video_pixels(
    config: GemmaMediaConfig,
    settings: Mapping[str, Any],
    videos: Sequence[Sequence[Any]],
    cut: int,
) -> list[np.ndarray]:
    """float32[slots, S, 3 cut^2] of each video's RGB frames.

    Args:
      config: of the model.
      settings: of `read_video_settings`.
      videos: frames of each.
      cut: pixels along the edge of what the tower takes, a patch or a square of them.

    Raises:
      DataError: the frames of a video are not of one size.
    """
    made = []
    for frames in videos:
        columns, rows = grid_of(config.edge, settings["max_soft_tokens"], frame_size(frames))
        size = rows * config.edge, columns * config.edge
        patches = np.stack([_patches(settings, frame, size, cut) for frame in frames])
        per_slot = settings["slot_tokens"] // (columns * rows)
        slots = -(-len(frames) // per_slot)
        room = settings["slot_tokens"] * (config.edge // cut) ** 2
        pixels = np.zeros((slots, room, patches.shape[-1]), np.float32)
        for slot in range(slots):
            shown = patches[slot * per_slot : (slot + 1) * per_slot].reshape(-1, patches.shape[-1])
            pixels[slot, : len(shown)] = shown
        made.append(pixels)
    return made


def _patches(
    settings: Mapping[str, Any], frame: Any, size: Size, cut: int
) -> Float[np.ndarray, "S inputs"]:
    """A frame resized as torch does it and cut line by line, float32[S, 3 cut^2]."""
    resized = resize(np.asarray(frame).transpose(2, 0, 1), size, settings["resample"])
    lines = _normalised(settings, resized).reshape(3, size[0] // cut, cut, size[1] // cut, cut)
    return lines.transpose(1, 3, 2, 4, 0).reshape(-1, 3 * cut**2)


def _normalised(settings: Mapping[str, Any], image: np.ndarray) -> Float[np.ndarray, "C H W"]:
    """float32[C, H, W] of uint8[C, H, W], in the float32 steps of transformers' video processors:
    rescaling is in the mean and the deviation, where these are taken."""
    shown, factor = image.astype(np.float32), settings["rescale_factor"]
    if not settings["do_normalize"]:
        return shown * np.float32(factor) if settings["do_rescale"] else shown
    levels = np.float32(1 / factor if settings["do_rescale"] else 1)
    mean, deviation = (
        np.array(settings[name], np.float32)[:, None, None] * levels
        for name in ("image_mean", "image_std")
    )
    return (shown - mean) / deviation


def frame_image(tokenizer: Any, layout: Layout) -> Layout:
    """With the tokens in front of and behind an image."""
    ids = [tokenizer.boi_token_id, *layout.ids, tokenizer.eoi_token_id]
    return dataclasses.replace(layout, ids=np.array(ids, np.int32))


def frame_video(tokenizer: Any, layout: Layout) -> Layout:
    """Every frame as an image, behind its time; that of the first one is in the prompt, see
    `spelled`.

    Times are tokenized as they stand there, between two special tokens.

    Raises:
      ModelError: the tokenizer writes another id for a video than the config's.
    """
    written = tokenizer.convert_tokens_to_ids(VIDEO)
    if written != layout.ids[0]:
        raise ModelError(
            f"config.json: video_token_id is {layout.ids[0]}, and the tokenizer's {VIDEO} {written}"
        )
    assert clock(layout.times[0]) == FIRST
    ids: list[int] = []
    for seconds, features in zip(
        layout.times, np.split(layout.ids, len(layout.times)), strict=True
    ):
        if ids:
            marked = f"{tokenizer.eoi_token} {clock(seconds)} {tokenizer.boi_token}"
            ids += tokenizer(marked, add_special_tokens=False)["input_ids"][1:-1]
        ids += [tokenizer.boi_token_id, *features, tokenizer.eoi_token_id]
    return dataclasses.replace(layout, ids=np.array(ids, np.int32))


def clock(seconds: float) -> str:
    """Minutes and seconds."""
    return f"{int(seconds // 60):02d}:{int(seconds % 60):02d}"


def spelled(tokenizer: Any) -> tuple[str, str]:
    """(what templates write for a video, what stands there for the tokenizer): the time of the
    first frame, which is text and tokenized with that beside it."""
    del tokenizer
    return VIDEO, f"{FIRST} {VIDEO}"


def video_token(config: GemmaMediaConfig, tokenizer: Any) -> int:
    """Id of what stands for a video in rendered text, which is made a special token, as
    transformers' processors make it one."""
    del config
    tokenizer.add_tokens([transformers.AddedToken(VIDEO, special=True)], special_tokens=True)
    return tokenizer.convert_tokens_to_ids(VIDEO)
