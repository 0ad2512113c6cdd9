"""Small copies of pictures, a few kilobytes each, for pages that hold a thousand of them."""

from __future__ import annotations

import io
import logging

from PIL import Image

from mmpo_jax.core.errors import DataError
from mmpo_jax.data.images import open_image
from mmpo_jax.data.records import MediaRef, VideoRef
from mmpo_jax.data.videos import spread_frames

log = logging.getLogger(__name__)

VERSION = 1
"""Changes with what is made of a picture."""
EDGE = 288
"""Longer edge, at most, in pixels."""
MAX_BYTES = 8_500
"""Size, at most: with its texts a prompt is to take 20 KB of a page."""
PIXEL_ART = 96
"""Longer edge up to which a picture is kept as it is."""
QUALITIES = (62, 45, 30, 18)
SHRUNK = 0.75
"""Factor of the edges where no quality makes a picture small enough."""


def make_thumbnail(ref: MediaRef) -> bytes | None:
    """A small copy as WebP, of a video of its middle frame; None where it cannot be opened, which
    the log says."""
    try:
        picture = spread_frames(ref, 1)[0] if isinstance(ref, VideoRef) else ref
        image = open_image(picture)
    except DataError as error:
        log.warning("no thumbnail: %s", error)
        return None
    if max(image.size) <= PIXEL_ART:
        return _encoded(image, lossless=True)
    image.thumbnail((EDGE, EDGE), Image.Resampling.LANCZOS, reducing_gap=3.0)
    while True:
        for quality in QUALITIES:
            data = _encoded(image, quality=quality)
            if len(data) <= MAX_BYTES:
                return data
        width, height = (max(1, round(edge * SHRUNK)) for edge in image.size)
        image = image.resize((width, height), Image.Resampling.LANCZOS)


def _encoded(image: Image.Image, lossless: bool = False, quality: int = 80) -> bytes:
    written = io.BytesIO()
    image.save(written, "WEBP", lossless=lossless, quality=quality, method=4)
    return written.getvalue()
