"""What an entry for an image or a video says beside which one it is: its other keys.

Some are read of videos, some would change what is shown and are refused, and the rest is counted.
"""

import math
from collections.abc import Mapping
from typing import Any

from mmpo_jax.data.records import VideoRef
from mmpo_jax.data.rows import brief
from mmpo_jax.data.skipped import UnusableRow

READ = ("fps", "video_start", "video_end")
"""Keys of a video that are read, with numbers: frames per second, and qwen-vl-utils' seconds where
what is shown begins and ends."""
_SAY_NOTHING = frozenset({"type", "text", "media_type", "mime_type", "cache_control"})
_REFUSED = frozenset(
    {
        *("min_pixels", "max_pixels", "total_pixels", "resized_height", "resized_width"),
        *("nframes", "num_frames", "min_frames", "max_frames", "sample_fps", "raw_fps"),
        *("do_sample_frames", "frames_indices"),
    }
)
"""Keys of qwen-vl-utils and transformers that change what is shown: here the checkpoint's
processors say it. OpenAI's `detail` is not among them: it tells a server of theirs what to do."""


def other_keys(entry: Mapping[str, Any], held: frozenset[str]) -> dict[str, Any]:
    """What an entry, or an object in it that it is held by, says beside the medium.

    Args:
      entry: of an image or a video.
      held: keys under which the medium is, or an object with it.
    """
    said: dict[str, Any] = {}
    for name in held:
        if isinstance(entry.get(name), Mapping):
            said |= other_keys(entry[name], held)
    own = {name: value for name, value in entry.items() if value is not None and name not in held}
    return said | {name: value for name, value in own.items() if name not in _SAY_NOTHING}


def unread_keys(said: Mapping[str, Any], medium: str, read: tuple[str, ...] = ()) -> list[str]:
    """The keys that mean nothing here, as the log calls them.

    Args:
      said: by `other_keys`.
      medium: how messages call it.
      read: keys that are read.

    Raises:
      UnusableRow: one would change what is shown, and is not read.
    """
    unread = []
    for name, value in said.items():
        if name in _REFUSED:
            detail = (
                f"{medium}.{name}: {brief(value)} is not read: what is shown is said by the "
                "checkpoint's processor, and of videos by fps, video_start and video_end"
            )
            raise UnusableRow("media_option", detail)
        if name not in read:
            unread.append(f"{medium}.{name}")
    return unread


def read_rate(said: Mapping[str, Any]) -> float | None:
    """
    Raises:
      UnusableRow: ``fps`` is no positive number.
    """
    fps = said.get("fps")
    if fps is None:
        return None
    if not (_is_number(fps) and fps > 0):
        raise UnusableRow("bad_video_entry", f"fps {brief(fps)} is no positive number")
    return fps


def read_seconds(said: Mapping[str, Any]) -> tuple[float | None, float | None] | None:
    """Beginning and end of what is shown; None where nothing says it.

    Raises:
      UnusableRow: they are no numbers from 0 on, or in the wrong order.
    """
    seconds = said.get("video_start"), said.get("video_end")
    for name, value in zip(("video_start", "video_end"), seconds, strict=True):
        if value is not None and not (_is_number(value) and value >= 0):
            raise UnusableRow("bad_video_entry", f"{name} {brief(value)} is no number from 0 on")
    start, end = seconds
    if end is not None and (start or 0) >= end:
        detail = f"video_start {start or 0} is not before video_end {end}"
        raise UnusableRow("bad_video_entry", detail)
    return None if seconds == (None, None) else seconds


def said_of(video: VideoRef) -> dict[str, float | None]:
    """What a row says beside a video: its rate, and the seconds where not all of it is shown."""
    if video.seconds is None:
        return {"fps": video.fps}
    start, end = video.seconds
    return {"fps": video.fps, "video_start": start, "video_end": end}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
