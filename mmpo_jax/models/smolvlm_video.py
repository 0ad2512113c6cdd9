"""Videos of SmolVLM2: which frames of a file are shown, their pixels, and what is said of them.

A frame is an image that is not cut; in front of each stands when it is.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import transformers

from mmpo_jax.models.config import ModelError
from mmpo_jax.models.frame_sampling import FRAME_RATE, Indices
from mmpo_jax.models.torch_resize import FrameBackend

INTRODUCTION, END = "You are provided the following series of", "\n\n"
"""What stands in front of every video, and behind it."""

SETTINGS = (
    "do_resize",
    "size",
    "max_image_size",
    "resample",
    "do_rescale",
    "rescale_factor",
    "do_normalize",
    "image_mean",
    "image_std",
)
"""Settings that a video processor shares with the image processor."""

LARGEST = 4096
"""Pixels of an image's or a frame's longer edge at most, whatever `size` says."""

SMALL = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    *("eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen"),
    "nineteen",
)
TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")


def introduced(frames: int, seconds: float) -> str:
    """What follows on `INTRODUCTION`."""
    length = datetime.timedelta(seconds=int(seconds))
    return f" {in_words(frames)} frames from a {length} [H:MM:SS] video.\n"


def label(seconds: float) -> str:
    """What stands in front of a frame that is at this time."""
    return f"\nFrame from {int(seconds // 60):02d}:{int(seconds % 60):02d}:"


def in_words(number: int) -> str:
    """An English cardinal below 1000, with "and" behind hundreds."""
    hundreds, rest = divmod(number, 100)
    tens, one = divmod(rest, 10)
    small = SMALL[rest] if rest < 20 else TENS[tens - 2] + f"-{SMALL[one]}" * bool(one)
    if not hundreds:
        return small
    return f"{SMALL[hundreds]} hundred" + f" and {small}" * bool(rest)


def spread(settings: Mapping[str, Any], total: int, rate: float | None) -> Indices:
    """Numbers of frames from the first to the last one, of long videos without the first and the
    last second: as many as a rate asks for, up to a number.

    See `frame_sampling.evenly`. Older files have `video_sampling`.

    Raises:
      ModelError: there is a number and no rate.
    """
    older = settings.get("video_sampling") or {}
    most = settings.get("num_frames") or older.get("max_frames")
    wanted = settings.get("fps") or older.get("fps")
    if settings.get("do_sample_frames") is False or not (most or wanted):
        return np.arange(total)
    if wanted is None:
        raise ModelError(f"the video processor's num_frames is {most}, but its fps is missing")
    most, rate = most or total, rate or FRAME_RATE
    length = total / rate
    count = max(1, min(round(wanted * length), most))
    first, last = 0, total - 1
    if length - 2 > most * wanted:
        first, last = int(rate), min(int(total - rate), total - 1)
        if first >= last:
            first, last = 0, total - 1
    return np.unique(np.linspace(first, last, count, dtype=int))


class _Frames(transformers.SmolVLMImageProcessorPil, FrameBackend):
    """Resizes to the longer edge, then to a square, normalises."""


def frame_pixels(
    settings: Mapping[str, Any], frames: Sequence[Any], shape: tuple[int, ...]
) -> np.ndarray:
    """float32[frames, C, H, W] of a video's RGB frames.

    Args:
      settings: of the video processor, or of the image processor with `video_sampling`.
      frames: PIL images.
      shape: the [C, H, W] that the vision tower takes.

    Raises:
      ModelError: the settings make frames of another shape, or resize in a way that torch has not.
    """
    known = {key: x for key, x in settings.items() if x is not None}
    size = known.get("video_sampling", {}).get("video_size") or known.get("size", _Frames.size)
    if not size.get("longest_edge"):
        raise ModelError(f"the video processor's size is {size}; this version wants longest_edge")
    known["size"] = {"longest_edge": min(size["longest_edge"], LARGEST)}
    kept = {name: known[name] for name in SETTINGS if name in known}
    processor = _Frames(**kept, do_image_splitting=False)
    made = [processor(frame, return_tensors="np")["pixel_values"][0] for frame in frames]
    pixels = np.concatenate(made).astype(np.float32)
    if pixels.shape[1:] != shape:
        raise ModelError(
            f"the video processor's settings make frames of shape {pixels.shape[1:]}, the vision "
            f"tower takes {shape}"
        )
    return pixels
