"""What is wrong with a sound picture or video that a model cannot take."""

from __future__ import annotations

from mmpo_jax.core.errors import DataError


class PictureSizeError(DataError):
    """A picture that is too narrow or too small."""


class VideoLengthError(DataError):
    """A video of too few frames, or too many."""


def size_text(size: tuple[int, int]) -> str:
    """How messages call a size of (height, width): the width first."""
    height, width = size
    return f"{width} x {height} pixels"
