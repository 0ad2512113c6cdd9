"""Images and videos as they travel in requests: data URLs of encoded images."""

from __future__ import annotations

import base64
import functools
import io

from mmpo_jax.core.errors import DataError
from mmpo_jax.data.edits import OF_PIXELS
from mmpo_jax.data.images import image_format, open_image
from mmpo_jax.data.records import ImageRef, MediaRef, VideoRef
from mmpo_jax.data.videos import spread_frames

MIME_TYPES = {
    "jpeg": "image/jpeg",
    "mpo": "image/jpeg",  # several JPEGs behind each other, as phones write; readers take the first
    "png": "image/png",
    "webp": "image/webp",
    "gif": "image/gif",
    "bmp": "image/bmp",
}
"""Formats that servers take, as Pillow calls them; others are sent as PNG."""

CACHED = 16
"""Data URLs that are kept: questions about one image stand next to each other."""
CACHED_VIDEOS = 4
"""Videos whose frames are kept as data URLs, likewise."""


def data_urls(media: MediaRef, video_frames: int) -> tuple[str, ...]:
    """The data URL of an image, or those of a video's frames.

    Args:
      media: the image or the video.
      video_frames: of a video, as `videos.spread_frames` takes them.

    Raises:
      DataError: see `data_url`; or a video cannot be decoded.
    """
    if isinstance(media, VideoRef):
        return _frame_urls(media.fingerprint(), media, video_frames)
    return (data_url(media),)


@functools.lru_cache(maxsize=CACHED_VIDEOS)
def _frame_urls(fingerprint: str, video: VideoRef, count: int) -> tuple[str, ...]:
    """As `_data_url`, of a video's frames."""
    return tuple(map(data_url, spread_frames(video, count)))


def data_url(image: ImageRef) -> str:
    """The image as a data URL.

    Its bytes are the original ones, as encoding again would change pixels. An image with an edit,
    or of a format that servers do not take, is sent as PNG: upright, in RGB.

    Raises:
      DataError: the file is missing, damaged or no image; or its edit is one of what a model is
        given (`edits.OF_PIXELS`) and not of a picture.
    """
    return _data_url(image.fingerprint(), image)


@functools.lru_cache(maxsize=CACHED)
def _data_url(fingerprint: str, image: ImageRef) -> str:
    """As `data_url`; a file that changed has another fingerprint."""
    if image.edit is not None and image.edit.kind in OF_PIXELS:
        raise DataError(f"image {image.name}: {image.edit.kind} is no picture that can be sent")
    mime = MIME_TYPES.get(image_format(image)) if image.edit is None else None
    if mime is not None:
        return _as_url(mime, image.read())
    buffer = io.BytesIO()
    open_image(image).save(buffer, "PNG")
    return _as_url("image/png", buffer.getvalue())


def _as_url(mime: str, data: bytes) -> str:
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"
