"""safetensors files written tensor by tensor, and their index."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from mmpo_jax.checkpoints.safetensors_files import DTYPES, INDEX_FILE, SINGLE_FILE, check_range
from mmpo_jax.core import progress
from mmpo_jax.models.config import ModelError

MAX_SHARD_BYTES = 5_000_000_000
"""Size of a file, at most, as transformers and the hub have it."""


@dataclasses.dataclass(frozen=True)
class NewTensor:
    """A tensor to be written."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    fetch: Callable[[], np.ndarray]
    """Brings it to this machine; called once, when its turn comes."""
    strips: Callable[[], Iterator[np.ndarray]] | None = None
    """The same, some rows after others, of one that is too large to be brought whole."""

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def split_into_files(
    tensors: Iterable[NewTensor], max_shard_bytes: int
) -> dict[str, list[NewTensor]]:
    """File name -> its tensors, in the order they are written.

    Files are filled in the order of names; a tensor larger than a file has one of its own.

    Raises:
      ModelError: a tensor is of a dtype that weights do not have.
    """
    files: list[list[NewTensor]] = [[]]
    filled = 0
    for tensor in sorted(tensors, key=lambda tensor: tensor.name):
        if tensor.dtype not in DTYPES.values():
            known = ", ".join(dtype.name for dtype in DTYPES.values())
            raise ModelError(
                f"{tensor.name} is {tensor.dtype.name}; weights are written as {known}"
            )
        if files[-1] and filled + tensor.num_bytes > max_shard_bytes:
            files.append([])
            filled = 0
        files[-1].append(tensor)
        filled += tensor.num_bytes
    for file in files:  # wide dtypes first, so that every tensor begins at a multiple of its own
        file.sort(key=lambda tensor: -tensor.dtype.itemsize)
    if len(files) == 1:
        return {SINGLE_FILE: files[0]}
    return {
        f"model-{number:05d}-of-{len(files):05d}.safetensors": file
        for number, file in enumerate(files, 1)
    }


def write_files(folder: str, files: Mapping[str, Sequence[NewTensor]]) -> None:
    """Writes files tensor by tensor, and their index where there are several.

    Never more than one tensor is in memory, and of a large one a part.

    Raises:
      ModelError: a file cannot be written, the disk being full for instance.
    """
    total = sum(tensor.num_bytes for tensors in files.values() for tensor in tensors)
    with progress.doing("writing weights", round(total / 1e6), "MB") as activity:
        written = 0
        for name, tensors in files.items():
            path = os.path.join(folder, name)
            try:
                for tensor in _write_file(path, tensors):
                    written += tensor.num_bytes
                    activity.reach(round(written / 1e6))
            except OSError as error:
                raise ModelError(
                    f"{path}: cannot be written: {error.strerror or error}; "
                    f"all weights together need {total / 1e9:.2f} GB"
                ) from error
    if len(files) > 1:
        weight_map = {tensor.name: name for name, tensors in files.items() for tensor in tensors}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        with open(os.path.join(folder, INDEX_FILE), "w") as file:
            file.write(json.dumps(index, indent=2) + "\n")


def _write_file(path: str, tensors: Sequence[NewTensor]) -> Iterator[NewTensor]:
    """Writes a file; the tensors as they are in it."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        begin, end = end, end + tensor.num_bytes
        header[tensor.name] = {
            "dtype": names[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            end = file.tell() + tensor.num_bytes
            for array in [tensor.fetch()] if tensor.strips is None else tensor.strips():
                found, expected = ((x.dtype, x.shape[1:]) for x in (array, tensor))
                assert found == expected, tensor.name
                file.write(_bytes(array, tensor.name))
                del array  # before the next is brought
            assert file.tell() == end, tensor.name
            yield tensor
        file.flush()
        os.fsync(file.fileno())


def _bytes(array: np.ndarray, name: str) -> memoryview:
    check_range(array, name)
    return np.asarray(array, order="C").reshape(-1).view(np.uint8).data
