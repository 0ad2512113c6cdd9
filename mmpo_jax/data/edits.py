"""Changed images: what image-aware objectives compare an image with."""

from __future__ import annotations

import functools

import numpy as np
from PIL import Image

from mmpo_jax.data.records import Edit

CROP_AREA = (0.01, 0.2)
CROP_ASPECT = (3 / 4, 4 / 3)
ANGLES = (10.0, 80.0)
DIFFUSION_STEPS = 1000
OF_PIXELS = ("noise", "blank", "masked")
"""Edits of what a model is given of an image, and not of a picture."""


def edit_image(image: Image.Image, edit: Edit | None) -> Image.Image:
    """A decoded image, changed; of the same size.

    `crop` enlarges a random part to the whole: a share of 0.01 to 0.2 of the area, of an aspect
    ratio between 3:4 and 4:3, as far as the image has it (mDPO, Wang et al. 2024, arXiv
    2406.11839). `rotate` turns it by 10 to 80 degrees, black where nothing is (CHiP's code).
    `black` has no colour at all.
    """
    if edit is None or edit.kind in OF_PIXELS:
        return image
    width, height = image.size
    if edit.kind == "black":
        return Image.new("RGB", image.size)
    random = np.random.default_rng(edit.seed)
    if edit.kind == "rotate":
        return image.rotate(random.uniform(*ANGLES))
    area = random.uniform(*CROP_AREA) * width * height
    aspect = np.exp(random.uniform(*np.log(CROP_ASPECT)))
    w = min(max(1, round(np.sqrt(area * aspect))), width)
    h = min(max(1, round(np.sqrt(area / aspect))), height)
    left, top = random.integers(width - w + 1), random.integers(height - h + 1)
    box = (left, top, left + w, top + h)
    return image.resize(image.size, Image.Resampling.BILINEAR, box=box)


def edit_pixels(pixels: np.ndarray, edit: Edit | None, patch_size: int = 1) -> np.ndarray:
    """What the model is given of an image, changed; of the same shape and dtype.

    `noise` is sqrt(a) x + sqrt(1 - a) e with e normal and a of the diffusion step, as VCD adds it
    (Leng et al. 2023, arXiv 2311.16922). `blank` is 0, the mean colour of the preprocessing.
    `masked` is that in a share of the patches, drawn at random: of those of a view, the same in
    every view (frames of a video), or of all patches that hold something. Views that show the same
    picture twice need `hide_squares`.

    Args:
      pixels: float32[slots, C, H, W] or float32[slots, patches, numbers]; of any shape but for
        `masked`.
      edit: the change; None for none.
      patch_size: pixels along the edge of a patch of the vision tower.
    """
    if edit is None or edit.kind not in OF_PIXELS:
        return pixels
    if edit.kind == "blank":
        return np.zeros_like(pixels)
    if edit.kind == "masked":
        return pixels * _shown_patches(pixels, edit, patch_size)
    kept = remaining_signal()[edit.step]
    noise = np.random.default_rng(edit.seed).standard_normal(pixels.shape)
    return (np.sqrt(kept) * pixels + np.sqrt(1 - kept) * noise).astype(np.float32)


def hide_squares(
    image: Image.Image, edit: Edit, grid: tuple[int, int], colour: tuple[int, ...]
) -> Image.Image:
    """A picture before it is cut into views, in which the share of `masked` has one colour.

    Args:
      image: RGB.
      edit: the change.
      grid: rows and columns of squares, which are the patches of a view of the whole picture.
      colour: RGB.
    """
    width, height = image.size
    rows, columns = grid
    pixels = np.array(image)
    for row, column in np.argwhere(~_drawn(rows * columns, edit).reshape(grid)):
        top, bottom = (at * height // rows for at in (row, row + 1))
        left, right = (at * width // columns for at in (column, column + 1))
        pixels[top:bottom, left:right] = colour
    return Image.fromarray(pixels)


def _shown_patches(pixels: np.ndarray, edit: Edit, patch_size: int) -> np.ndarray:
    """bool that broadcasts to `pixels`; False in the patches that are hidden."""
    if pixels.ndim == 3:
        shown = np.asarray(pixels.any(axis=-1))  # others fill slots up
        shown[shown] = _drawn(int(shown.sum()), edit)
        return shown[..., None]
    height, width = pixels.shape[2:]
    grid = -(-height // patch_size), -(-width // patch_size)
    shown = _drawn(grid[0] * grid[1], edit).reshape(grid)
    return shown.repeat(patch_size, axis=0).repeat(patch_size, axis=1)[:height, :width]


def _drawn(count: int, edit: Edit) -> np.ndarray:
    """bool[count], False in the share that is hidden."""
    shown = np.ones(count, bool)
    order = np.random.default_rng(edit.seed).permutation(count)
    shown[order[: round(edit.share * count)]] = False
    return shown


@functools.cache
def remaining_signal() -> np.ndarray:
    """float64[1000]: the product of 1 - b up to each step, b a sigmoid from 1e-5 to 5e-3."""
    steps = np.linspace(-6, 6, DIFFUSION_STEPS)
    betas = (5e-3 - 1e-5) / (1 + np.exp(-steps)) + 1e-5
    return np.cumprod(1 - betas)
