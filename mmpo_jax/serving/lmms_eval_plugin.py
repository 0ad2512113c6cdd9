"""What lmms-eval finds of us by its entry point.

    python -m lmms_eval --model mmpo_jax --model_args model=DIR --tasks pope --batch_size 16

It is imported only when it asks: it needs torch, and nothing else here does.
"""

from __future__ import annotations

from typing import Any


def manifest() -> Any:
    """The `ModelManifest` of lmms-eval (registry_v2, 0.7.3)."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("mmpo_jax", chat_class_path="mmpo_jax.serving.lmms_eval_model.Mmpo")
