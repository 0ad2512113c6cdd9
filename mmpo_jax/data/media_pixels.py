"""Images and videos as pixels, as a family and a checkpoint's settings say, with their edits."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image

from mmpo_jax.core.errors import DataError
from mmpo_jax.data.edits import edit_pixels, hide_squares
from mmpo_jax.data.images import image_size, open_image
from mmpo_jax.data.records import Edit, ImageRef, MediaRef, VideoRef
from mmpo_jax.data.skipped import SkipReason
from mmpo_jax.data.videos import read_frames, shown_range, video_facts
from mmpo_jax.models.family import Clip, Images, Videos
from mmpo_jax.models.frame_sampling import FRAME_RATE
from mmpo_jax.models.media_limits import PictureSizeError, VideoLengthError


class MediaError(DataError):
    """An image or video that the model cannot take."""

    reason: SkipReason = "image_broken"
    """Word that a row with it is counted under."""


_REASONS: tuple[tuple[type[DataError], SkipReason], ...] = (
    (PictureSizeError, "image_size"),
    (VideoLengthError, "video_length"),
)


def image_pixels(
    family: Images, config: Any, processor: Any, images: Sequence[ImageRef]
) -> list[np.ndarray]:
    """float32[slots, *slot_shape] of each image.

    Args:
      family: how it takes images.
      config: of the model.
      processor: of the checkpoint's images.
      images: some.

    Raises:
      DataError: an image cannot be read.
      MediaError: the model cannot take one of them.
    """
    opened = [open_image(image) for image in images]
    edits = [image.edit for image in images]
    with named(images):
        plain = family.pixels(config, processor, opened)
        in_views = [_masks_views(*one) for one in zip(plain, edits, strict=True)]
        if any(in_views):
            # Hidden in pixels, it would still be seen in another view: so the picture is changed.
            hidden = [
                _hidden(image, edit, views.shape[2:], config, processor)
                if in_view and edit is not None
                else image
                for image, edit, views, in_view in zip(opened, edits, plain, in_views, strict=True)
            ]
            plain = family.pixels(config, processor, hidden)
    rest = zip(edits, in_views, strict=True)
    return _edited(plain, [None if done else edit for edit, done in rest], config)


def video_pixels(
    family: Videos, config: Any, settings: dict[str, Any], videos: Sequence[VideoRef]
) -> list[np.ndarray]:
    """float32[slots, *slot_shape] of each video.

    Args:
      family: how it takes videos.
      config: of the model.
      settings: of the checkpoint's videos.
      videos: some.

    Raises:
      DataError: a frame cannot be read.
      MediaError: the model cannot take one of them.
    """
    clips = [_shown_frames(family, settings, video) for video in videos]
    with named(videos):
        plain = family.pixels(config, settings, clips)
    return _edited(plain, [video.parts[0].edit for video in videos], config)


def clip_of(
    family: Videos, settings: dict[str, Any], video: VideoRef
) -> tuple[Clip, Sequence[int]]:
    """(what is shown of a video, the numbers of its frames in a file)."""
    if video.file is None:
        size = image_size(video.frames[0])
        return Clip(len(video.frames), size, video.fps), range(len(video.frames))
    facts = video_facts(video)
    if video.fps is not None:
        settings = {**settings, "fps": video.fps, "num_frames": None, "do_sample_frames": True}
    among = shown_range(video)
    chosen = family.sample(settings, len(among), facts.rate) + among.start
    rate = facts.rate or FRAME_RATE
    times = tuple((chosen / rate).tolist())  # in the file, as those of qwen-vl-utils are
    shown = Clip(len(chosen), facts.size, len(chosen) / len(among) * rate, times)
    return shown, chosen.tolist()


@contextlib.contextmanager
def named(media: Sequence[MediaRef]) -> Iterator[None]:
    """Says whose fault it is where a family cannot take an image.

    Raises:
      MediaError: it cannot.
    """
    try:
        yield
    except DataError as error:
        raised = MediaError(f"{', '.join(one.name for one in media)}: {error}")
        raised.reason = next((r for kind, r in _REASONS if isinstance(error, kind)), raised.reason)
        raise raised from error


def _shown_frames(family: Videos, settings: dict[str, Any], video: VideoRef) -> list[Image.Image]:
    """The frames of a video that are shown, in RGB."""
    if video.file is None:
        return [open_image(frame) for frame in video.frames]
    return read_frames(video.file, clip_of(family, settings, video)[1])


def _masks_views(plain: np.ndarray, edit: Edit | None) -> bool:
    """Whether what is hidden in one of an image's views could be seen in another."""
    return edit is not None and edit.kind == "masked" and plain.ndim == 4 and len(plain) > 1


def _hidden(
    image: Image.Image, edit: Edit, view: tuple[int, ...], config: Any, processor: Any
) -> Image.Image:
    """A picture whose parts are hidden in all of its views, of [height, width] pixels each."""
    height, width = (-(-edge // config.vision.patch_size) for edge in view)
    red, green, blue = (round(255 * part) for part in processor.image_mean)
    return hide_squares(image, edit, (height, width), (red, green, blue))


def _edited(
    plain: Sequence[np.ndarray], edits: Sequence[Edit | None], config: Any
) -> list[np.ndarray]:
    size = config.vision.patch_size
    return [edit_pixels(x, edit, size) for x, edit in zip(plain, edits, strict=True)]
