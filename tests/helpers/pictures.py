"""Encoded images for the tests: a photograph, and every kind that trips an image pipeline."""

from __future__ import annotations

import io

import matplotlib.cbook
import numpy as np
from PIL import Image

from mmpo_jax.data.records import ImageRef, VideoRef


def noise(mode: str, width: int, height: int) -> Image.Image:
    """Smooth enough that resizing keeps something."""
    bands = {"L": (), "RGB": (3,), "RGBA": (4,)}[mode]
    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (max(1, height // 7), max(1, width // 7), *bands), np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BILINEAR)


def encode(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _photograph() -> bytes:
    with matplotlib.cbook.get_sample_data("grace_hopper.jpg") as file:
        return file.read()


def _rotated_jpeg() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turn a quarter clockwise
    return encode(noise("RGB", 90, 50), "JPEG", exif=exif, quality=95)


def _sixteen_bits() -> Image.Image:
    """Half of it black to Pillow's RGB, which cuts at 255."""
    return Image.fromarray((np.arange(60 * 80).reshape(60, 80) * 7 % 512).astype(np.uint16))


IMAGES = {
    "photograph": _photograph(),
    "one-pixel": encode(noise("RGB", 1, 1)),
    "wide": encode(noise("RGB", 4000, 300)),
    "tall": encode(noise("RGB", 300, 4000)),
    "odd-size": encode(noise("RGB", 83, 61)),
    "grey": encode(noise("L", 70, 90)),
    "transparent": encode(noise("RGBA", 70, 90)),
    "palette": encode(noise("RGB", 70, 90).quantize(37), "GIF"),
    "cmyk": encode(noise("RGB", 70, 90).convert("CMYK"), "JPEG"),
    "sixteen-bits": encode(_sixteen_bits()),
    "turned-by-exif": _rotated_jpeg(),
}


def refs(*names: str) -> tuple[ImageRef, ...]:
    return tuple(ImageRef(name, IMAGES[name]) for name in names)


def clip(frames: int) -> VideoRef:
    """A walk over the photograph."""
    photograph = Image.open(io.BytesIO(IMAGES["photograph"]))
    steps = [(30 * step, 60 + 20 * step) for step in range(frames)]
    cut = [encode(photograph.crop((x, y, x + 200, y + 150))) for x, y in steps]
    return VideoRef("clip", tuple(ImageRef(f"frame {i}", data) for i, data in enumerate(cut)))
