"""Video frames as single tiles, from the settings of a checkpoint's video processor.

transformers' own video processors need torch and torchvision. Their settings are those of an image
processor, and so is what they do but for resizing, which torch does in whole numbers of its own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import transformers
from jaxtyping import UInt8
from transformers.image_processing_backends import PilBackend
from transformers.image_transforms import get_resize_output_image_size

from mmpo_jax.core.errors import DataError
from mmpo_jax.models.config import ModelError
from mmpo_jax.models.family import Size

DEFAULTS: dict[str, Any] = {
    "do_resize": True,
    "size": {"height": 384, "width": 384},
    "resample": 3,  # bicubic
    "do_center_crop": False,
    "crop_size": None,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],  # CLIP's
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
"""What transformers takes for settings that the file leaves out, LLaVA-OneVision and InternVL."""


def frame_pixels(
    settings: Mapping[str, Any], frames: Sequence[Any], shape: tuple[int, ...]
) -> np.ndarray:
    """float32[frames, C, H, W] of a video's RGB frames.

    All frames are taken: which of a longer video are shown is the data's choice.

    Args:
      settings: of the video processor.
      frames: PIL images.
      shape: the [C, H, W] that the vision tower takes.

    Raises:
      ModelError: the settings make frames of another shape, or resize in a way that torch has not.
    """
    written = {key: value for key, value in settings.items() if value is not None}
    processor = _Frames(**{key: written.get(key, default) for key, default in DEFAULTS.items()})
    made = [processor(frame, return_tensors="np")["pixel_values"] for frame in frames]
    pixels = np.concatenate(made).astype(np.float32)
    if pixels.shape[1:] != shape:
        raise ModelError(
            f"the video processor's settings make frames of shape {pixels.shape[1:]}, the vision "
            f"tower takes {shape}"
        )
    return pixels


def frame_size(clip: Sequence[Any]) -> Size:
    """Height and width of a video's frames.

    Raises:
      DataError: they are not of one size.
    """
    sizes = {(frame.height, frame.width) for frame in clip}
    if len(sizes) > 1:
        raise DataError(f"the frames of a video have different sizes: {sorted(sizes)}")
    return sizes.pop()


class FrameBackend(PilBackend):
    """What transformers' image processors stand on, with the resizing of its video processors."""

    def resize(  # type: ignore[override]  # its other arguments are Pillow's
        self, image: np.ndarray, size: Any, resample: Any = None, **_: Any
    ) -> np.ndarray:
        """uint8[C, h, w] of uint8[C, H, W].

        Raises:
          ModelError: `size` or `resample` is not one that is implemented.
        """
        if size.height and size.width:
            return resize(image, (size.height, size.width), resample)
        if not size.shortest_edge or size.longest_edge:
            raise ModelError(
                f"the video processor's size is {size}, expected height and width, or shortest_edge"
            )
        edges = get_resize_output_image_size(
            image, size.shortest_edge, default_to_square=False, input_data_format="channels_first"
        )
        return resize(image, edges, resample)


class _Frames(transformers.CLIPImageProcessorPil, FrameBackend):
    """Resizes, cuts out the middle, normalises."""


def _linear(x: np.ndarray) -> np.ndarray:
    return np.maximum(1 - np.abs(x), 0)


def _cubic(x: np.ndarray) -> np.ndarray:
    """Keys' convolution kernel with a = -0.5 (torch takes -0.75 where it does not antialias)."""
    x = np.abs(x)
    near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    return np.where(x < 1, near, np.where(x < 2, far, 0))


def _lanczos(x: np.ndarray) -> np.ndarray:
    """A sinc in the window of a three times wider one."""
    return np.where(np.abs(x) < 3, np.sinc(x) * np.sinc(x / 3), 0)


FILTERS: dict[int, tuple[Callable[[np.ndarray], np.ndarray], int]] = {
    1: (_lanczos, 3),
    2: (_linear, 1),
    3: (_cubic, 2),
}
"""Pillow's number of a filter, which `resample` holds -> (the filter, how far it reaches)."""


def resize(
    image: UInt8[np.ndarray, "C H W"], size: tuple[int, int], resample: int
) -> UInt8[np.ndarray, "C h w"]:
    """What torch's `interpolate(..., antialias=True)` makes of uint8 on a CPU, bit for bit.

    First along rows, then along columns, each time with weights in whole numbers of 16 bits and
    results rounded to uint8. Pillow's filters are the same, but its weights have 22 bits and the
    order depends on the sizes, which moves pixels of noise by up to 24 levels.

    Args:
      image: uint8[C, H, W].
      size: (h, w).
      resample: a key of `FILTERS`.

    Returns:
      uint8[C, h, w].

    Raises:
      ModelError: another `resample`.
    """
    if resample not in FILTERS:
        raise ModelError(
            f"the video processor's resample is {resample}, expected one of {list(FILTERS)} "
            "(Lanczos, bilinear, bicubic)"
        )
    image = _resize_last(image, size[1], resample)
    return _resize_last(image.swapaxes(1, 2), size[0], resample).swapaxes(1, 2)


def _resize_last(image: np.ndarray, length: int, resample: int) -> np.ndarray:
    """uint8[..., length] of uint8[..., L]."""
    if image.shape[-1] == length:
        return image
    places, weights, bits = _weights(image.shape[-1], length, resample)
    total = np.full((*image.shape[:-1], length), 1 << (bits - 1), np.int32)
    for place, weight in zip(places, weights, strict=True):
        total += image[..., place] * weight
    return np.clip(total >> bits, 0, 255).astype(np.uint8)


@functools.lru_cache(maxsize=64)
def _weights(old: int, new: int, resample: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Which pixels of a line make up each new one.

    Args:
      old: how many the line has.
      new: how many it shall have.
      resample: a key of `FILTERS`.

    Returns:
      (int32[taps, new] places in the line, int32[taps, new] weights, the bits behind the weights'
      point: as many as leave the largest below 2^15).
    """
    function, reach = FILTERS[resample]
    stretch = max(old / new, 1.0)
    centers = (np.arange(new) + 0.5) * (old / new)
    first = np.maximum((centers - reach * stretch + 0.5).astype(int), 0)
    stop = np.minimum((centers + reach * stretch + 0.5).astype(int), old)
    places = first + np.arange((stop - first).max())[:, None]
    exact = np.where(places < stop, function((places - centers + 0.5) / stretch), 0)
    exact /= exact.sum(axis=0)
    bits = 0
    while bits < 22 and int(exact.max() * 2 ** (bits + 1) + 0.5) < 2**15:
        bits += 1
    whole = np.trunc(exact * 2**bits + np.copysign(0.5, exact)).astype(np.int32)
    return np.minimum(places, old - 1), whole, bits
