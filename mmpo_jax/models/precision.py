"""The dtype that a checkpoint is run in where no recipe names one."""

from __future__ import annotations

import numpy as np

from mmpo_jax.models.huggingface import weights_dtype
from mmpo_jax.models.model import Params


def inference_dtype(params: Params) -> np.dtype:
    """What generation, labelling, evaluation and scoring compute in: the dtype of the weights, but
    float32 for float16, whose largest number, 65504, activations of many models pass."""
    dtype = weights_dtype(params)
    return np.dtype(np.float32) if dtype == np.float16 else dtype
