"""Preference alignment of vision-language models in JAX.

    import mmpo_jax as mm

What is public is listed in `__all__` and described in docs/library.md; every other name may change
with any version. Nothing heavy is imported before a name is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmpo_jax.api import (
        generate,
        implicit_rewards,
        load,
        log_probs,
        make_term,
        record,
        save,
        start_training,
        training_batches,
    )
    from mmpo_jax.checkpoints.checkpoint import Checkpoint
    from mmpo_jax.core.errors import MmpoError
    from mmpo_jax.data.readers import read_records
    from mmpo_jax.data.records import ImageRef, Record, Response, Turn
    from mmpo_jax.objectives.pairs import Side, pairwise
    from mmpo_jax.parallel.mesh import make_mesh

__version__ = "0.1.0"

_PUBLIC = {
    "Checkpoint": "checkpoints.checkpoint",
    "ImageRef": "data.records",
    "MmpoError": "core.errors",
    "Record": "data.records",
    "Response": "data.records",
    "Side": "objectives.pairs",
    "Turn": "data.records",
    "generate": "api",
    "implicit_rewards": "api",
    "load": "api",
    "log_probs": "api",
    "make_mesh": "parallel.mesh",
    "make_term": "api",
    "pairwise": "objectives.pairs",
    "read_records": "data.readers",
    "record": "api",
    "save": "api",
    "start_training": "api",
    "training_batches": "api",
}
"""Public name -> the module that defines it."""

__all__ = [
    "Checkpoint",
    "ImageRef",
    "MmpoError",
    "Record",
    "Response",
    "Side",
    "Turn",
    "generate",
    "implicit_rewards",
    "load",
    "log_probs",
    "make_mesh",
    "make_term",
    "pairwise",
    "read_records",
    "record",
    "save",
    "start_training",
    "training_batches",
]


def __getattr__(name: str) -> Any:
    """A public name, whose module is imported when it is first used."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'mmpo_jax' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"mmpo_jax.{_PUBLIC[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
