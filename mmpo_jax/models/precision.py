"""The dtype that a checkpoint is run in where no recipe names one, and what no dtype held."""

from __future__ import annotations

import functools
from collections.abc import Iterable

import jax.numpy as jnp
import numpy as np

from mmpo_jax.core.errors import DataError
from mmpo_jax.core.trees import flatten
from mmpo_jax.models.merging import A
from mmpo_jax.models.model import Params

MATRICES = ("/kernel", "/embedding", f"/{A}")
"""Ends of the paths of parameters that are products' factors or tables."""


def weights_dtype(params: Params) -> np.dtype:
    """The dtype of a checkpoint: the narrowest that holds all of its matrices.

    Vectors do not count: norms are often float32 beside bfloat16. Of a run that froze most of a
    bfloat16 model it is float32, in which the rest was trained.
    """
    flat = flatten(params)
    matrices = [
        leaf
        for path, leaf in flat.items()
        if path.endswith(MATRICES) and jnp.issubdtype(leaf.dtype, jnp.floating)
    ]
    return functools.reduce(
        jnp.promote_types, (np.dtype(leaf.dtype) for leaf in matrices or flat.values())
    )


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
