"""The model below the adapters of a run whose base was quantised: its checkpoints hold the adapters
alone."""

from __future__ import annotations

import dataclasses
import os

from mmpo_jax.checkpoints.folders import BASE
from mmpo_jax.core.files import read_json, write_json
from mmpo_jax.core.processes import on_one
from mmpo_jax.models.quantized import Quantization

FILE = "below.json"
"""Beside the config in the `base/` of a run."""


@dataclasses.dataclass(frozen=True)
class Below:
    """What adapters were trained on."""

    model: str
    """The checkpoint that training started from, an absolute path or a hub id."""
    fingerprint: str
    """Its digest."""
    quantization: Quantization


def save_below(folder: str, below: Below) -> None:
    """
    Args:
      folder: of the run.
      below: what its checkpoints do not have.
    """
    on_one(lambda: write_json(os.path.join(folder, BASE, FILE), dataclasses.asdict(below)))


def read_below(base: str) -> Below | None:
    """
    Args:
      base: the run's `base/`.

    Returns:
      None for a run whose checkpoints have all of the model.
    """
    known = read_json(os.path.join(base, FILE))
    return Below(**known) if known else None
