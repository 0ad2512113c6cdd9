"""safetensors files: which there are, what they hold, and their tensors read by rows.

A file is the length of its header (8 bytes, little-endian), the header (JSON: dtype, shape and
place of every tensor), and the tensors' bytes one after another. Files are read with plain reads,
not mapped: a mapped file's pages count as memory of the process, beside the arrays made of them.
Paths go through `etils.epath`, so files to read may lie in a bucket.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from typing import Any

import ml_dtypes
import numpy as np
from etils import epath

from mmpo_jax.core.files import read_json
from mmpo_jax.models.config import ModelError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PICKLE_FILES = ("*.bin", "*.pt", "*.pth", "*.ckpt")

DTYPES = {
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
}
"""The dtypes of weights, by the names that headers give them."""

_MAX_HEADER_BYTES = 100_000_000
_COMPARED = 1 << 22
"""Numbers that are read and compared at once."""
_FINITE_BLOCK = 1 << 16
"""Numbers looked at together: few enough to lie in the processor's cache."""
_BITS = {
    **{"BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8},
    **{"U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32},
    **{"U64": 64, "I64": 64, "F64": 64, "C64": 64},
}


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file."""

    file: str
    name: str
    dtype: str
    """Name of the dtype in the header, see `DTYPES`."""
    shape: tuple[int, ...]
    offset: int
    """Bytes of the file before it."""
    num_bytes: int
    pitch: int | None = None
    """Numbers from one row to the next, of a part of a tensor that has less of each row."""
    inputs_first: bool = False
    """Whether it is a dense layer's kernel as it is multiplied, [inputs, outputs], of experts that
    lie in one tensor; torch's own are [outputs, inputs]."""


def weight_files(folder: str | os.PathLike[str]) -> list[str]:
    """The safetensors files of a checkpoint folder, of several sets those that transformers reads:
    what `transformers_weights` in the config names, else `model.safetensors`, else the files of
    the index.

    Raises:
      ModelError: there are none, or the index or the config names one that is not there.
    """
    root = epath.Path(folder)
    chosen, named_by = _chosen_file(root)
    names = [chosen]
    if chosen.endswith(".index.json"):
        names, named_by = _indexed_files(root / chosen), chosen
    for name in names:
        if (root / name).exists():
            continue
        told = f"{root / name}: not found"
        if named_by:
            raise ModelError(f"{told}; {named_by} names it")
        pickles = sorted(file.name for what in PICKLE_FILES for file in root.glob(what))
        if pickles:
            raise ModelError(
                f"{told}; there is {pickles[0]}, a pickle, which may run code and is never loaded. "
                "Save the weights as safetensors files"
            )
        raise ModelError(f"{told}; weights are read from safetensors files only")
    return [os.fspath(root / name) for name in names]


def _chosen_file(root: epath.Path) -> tuple[str, str | None]:
    """(the file or index to read, what names it if not custom).

    Raises:
      ModelError: the config names something else than a file beside it.
    """
    named = read_json(root / "config.json").get("transformers_weights")
    if named:
        if not isinstance(named, str) or os.path.basename(named) != named:
            raise ModelError(
                f"{root / 'config.json'}: transformers_weights {named!r} is not the name of a file "
                "beside it"
            )
        return named, "transformers_weights in config.json"
    has_index = (root / INDEX_FILE).exists() and not (root / SINGLE_FILE).exists()
    return INDEX_FILE if has_index else SINGLE_FILE, None


def _indexed_files(index: epath.Path) -> list[str]:
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"{index}: not an index of safetensors files: {error}") from error
    for name in names:
        if not isinstance(name, str) or os.path.basename(name) != name:
            raise ModelError(f"{index}: {name!r} is not the name of a file beside it")
    return names


def read_header(file: str) -> list[StoredTensor]:
    """The tensors of a file, in the order of their bytes.

    Raises:
      ModelError: it is no safetensors file, truncated or damaged; names the tensor where one is
        at fault.
    """
    try:
        with epath.Path(file).open("rb") as handle:
            handle.seek(0, os.SEEK_END)
            size = handle.tell()
            handle.seek(0)
            length = int.from_bytes(handle.read(8), "little")
            if not 2 <= length <= min(size - 8, _MAX_HEADER_BYTES):
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            header = json.loads(handle.read(length))
        if not isinstance(header, dict):
            raise ValueError("the header is no JSON object")
        header.pop("__metadata__", None)
        tensors = [_stored_tensor(file, name, header[name], 8 + length) for name in header]
        return _check_places(sorted(tensors, key=lambda tensor: tensor.offset), 8 + length, size)
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{file}: not a readable safetensors file: {error}") from error


def _stored_tensor(file: str, name: str, entry: Any, start: int) -> StoredTensor:
    """
    Raises:
      ValueError: the header's entry makes no sense.
    """
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        whole = all(isinstance(number, int) and number >= 0 for number in (*shape, begin, end))
        if not whole or not isinstance(dtype, str):
            raise TypeError
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"tensor {name}: the header says {json.dumps(entry)[:200]}") from error
    if dtype in _BITS and math.prod(shape) * _BITS[dtype] != 8 * (end - begin):
        raise ValueError(f"tensor {name}: {end - begin} bytes for {dtype} of shape {shape}")
    return StoredTensor(file, name, dtype, shape, start + begin, end - begin)


def _check_places(tensors: list[StoredTensor], start: int, size: int) -> list[StoredTensor]:
    """
    Raises:
      ValueError: tensors overlap, leave bytes out, or end after the file does.
    """
    for tensor in tensors:
        if tensor.offset != start:
            raise ValueError(f"tensor {tensor.name}: begins at byte {tensor.offset}, not {start}")
        start += tensor.num_bytes
        if start > size:
            raise ValueError(f"truncated: tensor {tensor.name} ends at byte {start} of {size}")
    if start != size:
        raise ValueError(f"{size - start} bytes after the last tensor")
    return tensors


def stored_dtypes(folder: str | os.PathLike[str]) -> set[str]:
    """Names of the dtypes of all tensors in a folder's files, as NumPy has them."""
    tensors = (tensor for file in weight_files(folder) for tensor in read_header(file))
    names = {tensor.dtype for tensor in tensors}
    return {DTYPES[name].name if name in DTYPES else name for name in names}


def check_dtype(tensor: StoredTensor) -> None:
    """
    Raises:
      ModelError: the tensor is of no dtype for weights.
    """
    if tensor.dtype not in DTYPES:
        raise ModelError(
            f"{tensor.file}: {tensor.name} is {tensor.dtype}; weights are read as "
            f"{', '.join(DTYPES)}"
        )


def read_tensor(tensor: StoredTensor) -> np.ndarray:
    """A whole tensor.

    Raises:
      ModelError: it is of no dtype for weights, or the file cannot be read.
    """
    check_dtype(tensor)
    rows, *others = tensor.shape or (1,)
    return read_rows(tensor, 0, rows, math.prod(others)).reshape(tensor.shape)


def read_rows(tensor: StoredTensor, start: int, stop: int, columns: int) -> np.ndarray:
    """Rows of a tensor seen as a matrix: [stop - start, columns].

    Raises:
      ModelError: the file cannot be read, or became shorter since its header was, or a number is
        not finite.
    """
    dtype, pitch = DTYPES[tensor.dtype], tensor.pitch or columns
    wanted = ((stop - start - 1) * pitch + columns) * dtype.itemsize
    try:
        with epath.Path(tensor.file).open("rb") as handle:
            handle.seek(tensor.offset + start * pitch * dtype.itemsize)
            data = handle.read(wanted)
    except OSError as error:
        raise ModelError(f"{tensor.file}: tensor {tensor.name}: {error}") from error
    if len(data) != wanted:
        raise ModelError(f"{tensor.file}: truncated while tensor {tensor.name} was read")
    numbers = np.frombuffer(data, dtype)
    rows = np.lib.stride_tricks.as_strided(
        numbers,
        (stop - start, columns),
        (pitch * dtype.itemsize, dtype.itemsize),
        writeable=False,
    )
    if not all_finite(rows):
        raise ModelError(
            f"{tensor.file}: tensor {tensor.name} has numbers that are not finite (NaN or "
            "infinity): the file is damaged, or training diverged before it was written"
        )
    return rows


def equal_tensors(a: StoredTensor, b: StoredTensor) -> bool:
    """Whether two tensors hold the same numbers; read in parts, up to the first difference.

    Raises:
      ModelError: see `read_tensor`.
    """
    check_dtype(a)
    check_dtype(b)
    if a.shape != b.shape:
        return False
    rows, *others = a.shape or (1,)
    columns = math.prod(others)
    step = max(1, _COMPARED // max(1, columns))
    return all(
        np.array_equal(
            read_rows(a, start, min(start + step, rows), columns),
            read_rows(b, start, min(start + step, rows), columns),
        )
        for start in range(0, rows, step)
    )


def all_finite(array: np.ndarray) -> bool:
    """Whether no number is NaN or infinite.

    Of 16-bit floats, which NumPy converts for that one by one, the bits are looked at.
    """
    if array.dtype.itemsize != 2:
        return bool(np.isfinite(array).all())
    if not array.size:
        return True
    infinity = np.array(np.inf, array.dtype).view(np.uint16)
    blocks = np.ascontiguousarray(array).reshape(-1).view(np.uint16)
    return all(
        (blocks[start : start + _FINITE_BLOCK] & 0x7FFF).max() < infinity
        for start in range(0, len(blocks), _FINITE_BLOCK)
    )


def check_range(array: np.ndarray, name: str) -> None:
    """
    Raises:
      ModelError: a tensor that was cast has numbers that its dtype does not hold.
    """
    if not all_finite(array):
        largest = float(ml_dtypes.finfo(array.dtype).max)
        other = "; bfloat16 and float32 hold larger ones" if array.dtype == np.float16 else ""
        raise ModelError(
            f"{name} is not finite as {array.dtype.name}, whose largest number is {largest:g}"
            f"{other}"
        )
