"""Weights in another dtype: nearest or stochastic rounding, and how much of an update survives it.

What training changes is small beside a weight. A bfloat16 weight has steps of 1/256 to 1/128 of
its size, and what is less than half a step is gone when it is rounded to the nearest one.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import ml_dtypes
import numpy as np

from mmpo_jax.checkpoints.safetensors_writing import NewTensor
from mmpo_jax.models.config import ModelError

_STOCHASTIC = "_stochastic"
_BLOCK = 2**20
"""Numbers whose products are added up at once in float64."""


def stored_dtype(name: str | np.dtype) -> np.dtype:
    """The dtype of the file."""
    return np.dtype(name.removesuffix(_STOCHASTIC) if isinstance(name, str) else name)


def round_tensor(array: np.ndarray, name: str | np.dtype, key: str) -> np.ndarray:
    """A tensor in another dtype.

    Args:
      array: of a dtype of weights.
      name: a `SaveDtype`, or a dtype.
      key: the tensor's name, which messages give and random numbers follow from, so that the same
        weights are always saved as the same file.

    Raises:
      ModelError: a finite number is beyond the range of the dtype.
    """
    dtype = stored_dtype(name)
    if array.dtype == dtype:
        return array
    if isinstance(name, str) and name.endswith(_STOCHASTIC):
        rounded = _round_stochastically(array, zlib.crc32(key.encode()))
    else:
        with np.errstate(over="ignore"):
            rounded = array.astype(dtype)
    beyond = ~np.isfinite(rounded) & np.isfinite(array)
    if beyond.any():
        value = float(array[beyond].flat[0])
        raise ModelError(
            f"{key}: {value:.6g} is beyond the range of {dtype.name}; save as float32 or bfloat16"
        )
    return rounded


def _round_stochastically(array: np.ndarray, seed: int) -> np.ndarray:
    """float32 -> bfloat16, away from zero with the probability of what is cut off.

    A bfloat16 is the upper half of a float32, so a random lower half is added before it is cut.
    """
    exact = np.ascontiguousarray(array, np.float32)
    noise = np.random.default_rng(seed).integers(0, 2**16, exact.shape, np.uint16)
    bits = (exact.view(np.uint32) + noise) >> 16
    rounded = bits.astype(np.uint16).view(ml_dtypes.bfloat16)
    # What is no number has no neighbours.
    return np.where(np.isfinite(exact), rounded, exact.astype(ml_dtypes.bfloat16))


class Survival:
    """How much of an update is in weights as they are saved.

    <saved - before, trained - before> / |trained - before|^2 over all parameters: the saved
    change along the trained one, in units of it. 0 where everything was rounded back. What was not
    trained does not count.
    """

    def __init__(self) -> None:
        self.product = self.square = 0.0

    def add(self, before: np.ndarray, trained: np.ndarray, saved: np.ndarray) -> None:
        """Counts a tensor, given in three states."""
        flat = [np.ascontiguousarray(array).reshape(-1) for array in (before, trained, saved)]
        for start in range(0, flat[0].size, _BLOCK):
            first, exact, kept = (
                array[start : start + _BLOCK].astype(np.float64) for array in flat
            )
            change = exact - first
            self.product += float(change @ (kept - first))
            self.square += float(change @ change)

    @property
    def share(self) -> float | None:
        """Share of the update that is left; None where nothing was changed."""
        return self.product / self.square if self.square else None


def rounded(
    tensor: NewTensor,
    name: str | np.dtype,
    before: Mapping[str, NewTensor],
    survival: Survival,
) -> NewTensor:
    """A tensor that is rounded when its turn comes.

    Args:
      tensor: as it was trained.
      name: see `round_tensor`.
      before: the tensors that training began with, by name, of which this one is compared; may
        be empty.
      survival: counts it then.
    """

    def fetch() -> np.ndarray:
        exact = tensor.fetch()
        saved = round_tensor(exact, name, tensor.name)
        if tensor.name in before:
            survival.add(before[tensor.name].fetch(), exact, saved)
        return saved

    return NewTensor(tensor.name, stored_dtype(name), tensor.shape, fetch)
