"""Where a recipe's `model` points: a checkpoint folder, a training run, or a built-in one."""

from __future__ import annotations

import os
from pathlib import Path

from mmpo_jax.models.config import ModelError

BUILTIN = {"builtin:shapes": Path(__file__).parent.parent / "shapes" / "checkpoint"}
"""Checkpoints that ship with the package."""


def resolve_folder(name: str) -> str:
    """The folder a recipe's `model` names.

    Raises:
      ModelError: there is no such folder or built-in checkpoint.
    """
    if name in BUILTIN:
        return str(BUILTIN[name])
    if name.startswith("builtin:"):
        raise ModelError(f"{name}: unknown; built in are {', '.join(BUILTIN)}")
    if not os.path.isdir(name):
        raise ModelError(f"{name}: there is no such checkpoint folder")
    return os.path.abspath(name)
