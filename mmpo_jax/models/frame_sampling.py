"""Which frames of a video file a model is shown, by the settings of its video processor.

As transformers' processors choose them: frames where `do_sample_frames` is set, or by default where
a number of frames or a rate is, and else all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Int

from mmpo_jax.models.config import ModelError
from mmpo_jax.models.media_limits import VideoLengthError

FRAME_RATE = 24.0
"""What transformers takes a video of unknown rate to have."""

Indices = Int[np.ndarray, " F"]


def evenly(settings: Mapping[str, Any], total: int, rate: float | None) -> Indices:
    """Numbers of frames at even distances, the first one among them: LLaVA-OneVision.

    Args:
      settings: of the video processor.
      total: frames of the file.
      rate: frames per second, where known.

    Raises:
      ModelError: the settings contradict each other.
      VideoLengthError: there are too few frames.
    """
    count, fps = _asked(settings)
    if count is None and fps is not None:
        count = max(1, int(total / (rate or FRAME_RATE) * fps))
    if count is None:
        return np.arange(total)
    _check(count, total)
    return np.arange(count) * total // count


def centred(settings: Mapping[str, Any], total: int, rate: float | None) -> Indices:
    """Numbers of the frames in the middle of even parts, or from `initial_shift` on: InternVL.

    See `evenly`.
    """
    count, fps = _asked(settings)
    if count is None and fps is not None:
        count = int(total / (rate or FRAME_RATE) * fps)
    if count is None:
        return np.arange(total)
    _check(count, total)
    shift = settings.get("initial_shift", True)
    return _steps(total / count / 2 if shift is True else float(shift or 0), total, count)


def whole_patches(settings: Mapping[str, Any], total: int, rate: float | None) -> Indices:
    """Numbers of frames at even distances, as many as fill patches of time: Qwen2.5-VL.

    See `evenly`.
    """
    count, fps = _asked(settings)
    depth = settings.get("temporal_patch_size") or 2
    if count is not None:
        count = round(count / depth) * depth
    elif fps is not None:
        most = min(settings.get("max_frames") or 768, total) // depth * depth
        wanted = max(total / (rate or FRAME_RATE) * fps, settings.get("min_frames") or 4)
        count = math.floor(min(wanted, most, total) / depth) * depth
    else:
        return np.arange(total)
    _check(count, total)
    return _steps(0.0, total, count)


def from_end_to_end(settings: Mapping[str, Any], total: int, rate: float | None) -> Indices:
    """Numbers of frames from the first to the last one: Qwen3-VL, two a second by default.

    See `evenly`.
    """
    count, fps = _asked({"fps": 2, "do_sample_frames": True, **settings})
    least, most = settings.get("min_frames") or 4, settings.get("max_frames") or 768
    if fps is not None:
        wanted = int(total / (rate or FRAME_RATE) * fps)
        count = min(max(wanted, least), most, total)
    elif count is None and settings.get("do_sample_frames", True):
        count = min(max(total, least), most)
    if count is None:
        return np.arange(total)
    return np.linspace(0, total - 1, count).round().astype(int)


def _asked(settings: Mapping[str, Any]) -> tuple[int | None, float | None]:
    """(number of frames, frames per second), at most one of which is there."""
    count, fps = settings.get("num_frames"), settings.get("fps")
    sampled = settings.get("do_sample_frames")
    if sampled is False:
        return None, None
    if count is not None and fps is not None:
        raise ModelError(
            f"the video processor's num_frames is {count} and its fps {fps}; one has to be null"
        )
    return count, fps


def _check(count: int, total: int) -> None:
    if not 0 < count <= total:
        raise VideoLengthError(f"{count} frames are to be shown of a video of {total}")


def _steps(start: float, total: int, count: int) -> Indices:
    """What torch's `arange(start, total, total / count).int()` is, whose numbers are float32."""
    step = total / count
    places = start + np.arange(math.ceil((total - start) / step)) * step
    return places.astype(np.float32).astype(int)
