"""The dtype that a checkpoint is run in where no recipe names one, and what no dtype held."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from mmpo_jax.errors import DataError
from mmpo_jax.models.huggingface import weights_dtype
from mmpo_jax.models.model import Params


def inference_dtype(params: Params) -> np.dtype:
    """What generation, labelling, evaluation and scoring compute in: the dtype of the weights, but
    float32 for float16, whose largest number, 65504, activations of many models pass."""
    dtype = weights_dtype(params)
    return np.dtype(np.float32) if dtype == np.float16 else dtype


def check_finite(what: str, rows: Iterable[tuple[str, bool]], dtype: str) -> None:
    """Says of which rows a model computed NaN or infinity.

    Args:
      what: was computed.
      rows: (id, whether it is all finite).
      dtype: that it was computed in.

    Raises:
      DataError: some are not, naming the first of them.
    """
    bad = [name for name, finite in rows if not finite]
    if not bad:
        return
    more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
    way_out = "look at the weights"
    if dtype != "float32":
        way_out = f"compute in float32, to which `mmpo convert` takes weights, or {way_out}"
    raise DataError(
        f"the {what} of rows {', '.join(bad[:5])}{more} are not finite in {dtype}: the model's "
        f"activations overflow; {way_out}"
    )
