"""Video frames as single tiles, from the settings of a checkpoint's video processor.

transformers' own video processors need torch and torchvision; their settings are those of an
image processor, which does the same to each frame with Pillow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import transformers

from mmpo_jax.models.config import ModelError

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
      ModelError: the settings make frames of another shape.
    """
    written = {key: value for key, value in settings.items() if value is not None}
    chosen = {key: written.get(key, default) for key, default in DEFAULTS.items()}
    processor = transformers.CLIPImageProcessorPil(**chosen)
    made = [processor(frame, return_tensors="np")["pixel_values"] for frame in frames]
    pixels = np.concatenate(made).astype(np.float32)
    if pixels.shape[1:] != shape:
        raise ModelError(
            f"the video processor's settings make frames of shape {pixels.shape[1:]}, the vision "
            f"tower takes {shape}"
        )
    return pixels
