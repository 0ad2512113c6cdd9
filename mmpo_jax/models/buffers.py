"""Numbers of checkpoints that nothing trains: torch keeps them as buffers of modules."""

from __future__ import annotations

import re

NAMES = (
    *("layer_scalar", "std_bias", "std_scale"),
    *("input_min", "input_max", "output_min", "output_max"),
)
"""Factors of Gemma 4's decoder layers, mean and deviation of its images' features, limits of what
its vision transformer's dense layers read and give."""


def is_buffer(path: str) -> bool:
    """Whether a parameter is one of them, by its path."""
    return re.fullmatch(rf".*/({'|'.join(NAMES)})", path) is not None
