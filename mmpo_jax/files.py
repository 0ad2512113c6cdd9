"""Files that appear whole, their fingerprints, and Arrow tables as deterministic Parquet bytes.

Paths go through `etils.epath`, so a folder may be local or in a bucket (``gs://...``).
"""

import contextlib
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from etils import epath

from mmpo_jax.errors import DataError

_CHUNK_BYTES = 1 << 22


def is_local(path: epath.PathLike) -> bool:
    """Whether `path` lies on a file system of this machine and not in a bucket."""
    return "://" not in os.fspath(path)


def write_atomic(path: epath.PathLike, data: bytes) -> None:
    """Write `data` to `path` so that other readers see the old file or the whole new one.

    A local file is written beside its destination, flushed to the disk and renamed. Object
    stores show an upload only when it is complete, so there a plain write is enough.

    Raises:
      OSError: the file could not be written. The old file is untouched, the temporary one gone.
    """
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if not is_local(path):
        path.write_bytes(data)
        return
    # A name of its own for each writer: two processes on one folder must not mix their bytes.
    unique = f"{os.getpid()}-{secrets.token_hex(4)}"
    temporary = os.fspath(path.parent / f".{path.name}.{unique}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: epath.Path) -> None:
    """Make a rename survive a power cut, where the file system knows how to."""
    with contextlib.suppress(OSError):  # Some network file systems refuse fsync on a folder.
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def fingerprint_bytes(data: bytes) -> str:
    """SHA-256 of `data` in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def fingerprint_file(path: epath.PathLike) -> str:
    """SHA-256 of the contents of a file, read in chunks.

    Raises:
      DataError: the file is missing or cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with epath.Path(path).open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
    except OSError as error:
        raise DataError(f"cannot read {os.fspath(path)}: {error.strerror or error}") from error
    return digest.hexdigest()


def fingerprint_folder(path: epath.PathLike) -> str:
    """SHA-256 over the relative names and the contents of all files below a folder.

    Neither the place of the folder nor the times of the files matter. Links are followed, since
    a Hugging Face cache is made of links. Names that begin with a dot are left out: there
    downloaders and desktops keep notes, and `write_atomic` its unfinished files. So is README.md,
    which says what a checkpoint is and changes nothing about it.

    In a bucket, weights count by size and time, lest every process download all of them.

    Raises:
      DataError: `path` is not a folder, or a file in it cannot be read.
    """
    root = epath.Path(path)
    if not root.is_dir():
        raise DataError(f"there is no folder {os.fspath(path)}")
    files = {file.relative_to(root).as_posix(): file for file in _files_below(root)}
    return fingerprint_json([[name, _fingerprint_entry(files[name])] for name in sorted(files)])


def _fingerprint_entry(file: epath.Path) -> Any:
    if is_local(file) or file.suffix != ".safetensors":
        return fingerprint_file(file)
    found = file.stat()
    return [found.length, found.mtime]


def _files_below(folder: epath.Path) -> Iterator[epath.Path]:
    for entry in folder.iterdir():
        if entry.name.startswith(".") or entry.name == "README.md":
            continue
        if entry.is_dir():
            yield from _files_below(entry)
        else:
            yield entry


def canonical_json(value: Any) -> str:
    """The one JSON text of `value`: sorted keys, no spaces, ASCII.

    Raises:
      TypeError: `value` holds something that is not JSON.
      ValueError: `value` holds NaN or an infinity.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def fingerprint_json(value: Any) -> str:
    """SHA-256 of `canonical_json(value)`; equal for equal values whatever the order of keys."""
    return fingerprint_bytes(canonical_json(value).encode())


def read_json(path: epath.PathLike) -> dict[str, Any]:
    """The object in a JSON file; empty where the file is missing or damaged."""
    try:
        value = json.loads(read_bytes(path))
    except (OSError, ValueError, DataError):
        return {}
    return value if isinstance(value, dict) else {}


def replace_folder(target: str, write: Callable[[str], Any]) -> None:
    """Puts a folder in place whole, by rename: `write(staging)` makes it beside the target.

    What it raises passes through; then nothing is left of what it wrote.
    """
    staging = target.rstrip("/") + ".incomplete"
    shutil.rmtree(staging, ignore_errors=True)
    try:
        write(staging)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    shutil.rmtree(target, ignore_errors=True)
    os.replace(staging, target)


def encode_table(table: pa.Table) -> bytes:
    """`table` as a Parquet file in memory.

    The bytes depend on the rows and the schema only, not on how the table was put together, and
    every page carries a checksum that `decode_table` verifies.
    """
    sink = pa.BufferOutputStream()
    pq.write_table(table.combine_chunks(), sink, compression="zstd", write_page_checksum=True)
    return sink.getvalue().to_pybytes()


def decode_table(data: bytes, name: str) -> pa.Table:
    """The table of which `encode_table` made `data`; `name` is the file, for the message.

    Raises:
      DataError: the bytes are truncated, damaged or no Parquet file.
    """
    try:
        # Arrow's reader threads can outlive the interpreter and then abort the process.
        file = pq.ParquetFile(
            pa.BufferReader(data), page_checksum_verification=True, pre_buffer=False
        )
        return file.read(use_threads=False)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{name} is not a readable Parquet file: {error}") from error


def write_table(path: epath.PathLike, table: pa.Table) -> None:
    """Write `table` to a Parquet file that appears whole.

    Raises:
      OSError: the file could not be written; nothing of it is left behind.
    """
    write_atomic(path, encode_table(table))


def read_table(path: epath.PathLike) -> pa.Table:
    """Read a whole Parquet file and verify its checksums.

    Raises:
      DataError: the file is missing, truncated, damaged or no Parquet file.
    """
    return decode_table(read_bytes(path), os.fspath(path))


def read_bytes(path: epath.PathLike) -> bytes:
    """The contents of a file.

    Raises:
      DataError: the file is missing or cannot be read.
    """
    try:
        return epath.Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {os.fspath(path)}: {error.strerror or error}") from error
