"""Draws a scene as an RGB image."""

from __future__ import annotations

import io
import math

import numpy as np
from PIL import Image, ImageDraw

from mmpo_jax.picture_world.world import GRID, Scene

MIN_IMAGE_SIZE = 24

_RGB = {
    "red": (220, 30, 40),
    "green": (20, 150, 60),
    "blue": (40, 70, 220),
    "yellow": (245, 195, 10),
}
# Drawn this many times larger and averaged down: Pillow's polygons have hard edges.
_SUPERSAMPLING = 4
_RADIUS = (0.38, 0.44)  # of a cell

Point = tuple[float, float]


def render(scene: Scene, image_size: int = 48) -> Image.Image:
    """Draws the scene; equal arguments give equal pixels.

    Args:
      scene: what to draw. Its `jitter_seed` shifts and scales every thing a little inside its
        cell and tints the light background.
      image_size: height and width in pixels.

    Returns:
      An RGB image of `image_size` x `image_size` pixels.

    Raises:
      ValueError: `image_size` below `MIN_IMAGE_SIZE`, where shapes could no longer be told apart.
    """
    if image_size < MIN_IMAGE_SIZE:
        raise ValueError(f"image_size must be at least {MIN_IMAGE_SIZE}, not {image_size}")
    rng = np.random.default_rng(scene.jitter_seed)
    red, green, blue = (int(level) for level in rng.integers(228, 250, size=3))
    background = (red, green, blue)
    size = image_size * _SUPERSAMPLING
    image = Image.new("RGB", (size, size), background)
    draw = ImageDraw.Draw(image)
    cell = size / GRID
    for thing in scene.things:
        radius = rng.uniform(*_RADIUS) * cell
        # Things stay inside their cell, so that rows and columns are never in doubt.
        slack = cell / 2 - radius
        dx, dy = rng.uniform(-slack, slack, size=2)
        centre = ((thing.column + 0.5) * cell + dx, (thing.row + 0.5) * cell + dy)
        _draw_shape(draw, thing.shape, centre, radius, _RGB[thing.colour], background)
    return image.reduce(_SUPERSAMPLING)


def png_bytes(scene: Scene, image_size: int = 48) -> bytes:
    """The drawing of `render`, encoded as PNG. Raises what `render` raises."""
    buffer = io.BytesIO()
    render(scene, image_size).save(buffer, format="PNG")
    return buffer.getvalue()


def _draw_shape(
    draw: ImageDraw.ImageDraw,
    shape: str,
    centre: Point,
    radius: float,
    colour: tuple[int, int, int],
    background: tuple[int, int, int],
) -> None:
    if shape == "circle":
        draw.ellipse(_box(centre, radius), fill=colour)
    elif shape == "ring":
        draw.ellipse(_box(centre, radius), fill=colour)
        draw.ellipse(_box(centre, 0.5 * radius), fill=background)
    elif shape == "square":
        draw.rectangle(_box(centre, 0.85 * radius), fill=colour)
    elif shape == "triangle":
        draw.polygon(_polar(centre, [radius] * 3), fill=colour)
    elif shape == "star":
        draw.polygon(_polar(centre, [radius, 0.4 * radius] * 5), fill=colour)
    elif shape == "cross":
        x, y = centre
        arm = 0.28 * radius
        draw.rectangle((x - radius, y - arm, x + radius, y + arm), fill=colour)
        draw.rectangle((x - arm, y - radius, x + arm, y + radius), fill=colour)
    else:
        raise ValueError(f"no drawing for shape {shape!r}")


def _box(centre: Point, half_width: float) -> tuple[float, float, float, float]:
    x, y = centre
    return (x - half_width, y - half_width, x + half_width, y + half_width)


def _polar(centre: Point, radii: list[float]) -> list[Point]:
    """Corners at equal angles around the centre, clockwise from straight up."""
    x, y = centre
    angles = [2 * math.pi * i / len(radii) for i in range(len(radii))]
    return [(x + r * math.sin(a), y - r * math.cos(a)) for r, a in zip(radii, angles, strict=True)]
