"""Files that appear whole, their fingerprints, and Arrow tables as deterministic Parquet bytes.

Paths go through `etils.epath`, so a folder may be local or in a bucket (``gs://...``).
"""

import contextlib
import hashlib
import json
import math
import os
import posixpath
import re
import secrets
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from etils import epath

from mmpo_jax.core.errors import DataError, MmpoError

HASHING_THREADS = 8
MIN_KEPT_BYTES = 1 << 24
"""Size of a file, at least, whose digest is kept."""
SETTLED_NS = 2_000_000_000
"""Age of a file whose digest is kept; the coarsest clock of a file system ticks every 2 seconds."""
STORAGE = {"gs": "gcsfs", "s3": "s3fs", "az": "adlfs", "hf": "huggingface_hub"}
"""Schemes of paths that are not on this machine -> the package that knows them."""
_CHUNK_BYTES = 1 << 22


def cache_folder() -> str:
    """Folder of what can be made again; `MMPO_CACHE` or `XDG_CACHE_HOME` moves it.

    Raises:
      MmpoError: it is in a bucket: a database and files that are mapped into memory lie there.
    """
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = os.environ.get("MMPO_CACHE") or os.path.join(caches, "mmpo_jax")
    if not is_local(folder):
        raise MmpoError(
            f"MMPO_CACHE: {folder}: has to be a folder of this machine, as tokenised rows, digests "
            "and copies of what is in buckets lie there; compiled programs may be in a bucket: "
            "JAX_COMPILATION_CACHE_DIR"
        )
    return folder


def is_local(path: epath.PathLike) -> bool:
    """Whether `path` lies on a file system of this machine and not in a bucket."""
    return "://" not in os.fspath(path)


def check_reachable(path: epath.PathLike) -> None:
    """
    Raises:
      MmpoError: a path by URL whose scheme is not read, whose library is not installed, or whose
        storage does not answer.
    """
    name = os.fspath(path)
    if is_local(name):
        return
    scheme = name.partition("://")[0]
    if scheme not in STORAGE:
        told = "give the path alone" if scheme == "file" else "download it and give its path"
        repository = re.match(r"https?://(?:huggingface\.co|hf\.co)/([\w.-]+/[\w.-]+)/?$", name)
        if repository:
            told = f"a model of the hub is called {repository[1]}"
        raise MmpoError(f"{name}: nothing is read or written by {scheme}://; {told}")
    try:
        epath.Path(name).exists()
    except ImportError as error:
        raise MmpoError(
            f"{name}: {scheme}:// needs the package {STORAGE[scheme]}, which is not installed"
        ) from error
    except Exception as error:  # every storage client raises types of its own
        told = str(error).strip().partition("\n")[0] or type(error).__name__
        raise MmpoError(
            f"{name}: cannot be reached: {told}; {scheme}:// needs credentials, and the network"
        ) from error


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


def fingerprint_files(files: Mapping[str, epath.PathLike]) -> str:
    """SHA-256 over the names and the contents of files.

    Neither the places of the files nor their times matter. Of large files the digests are kept in
    `cache_folder()`, so that a file that did not change is not read again. In a bucket, weights
    and large files count by size and time, lest every process download all of them.

    Args:
      files: name -> path.

    Raises:
      DataError: a file cannot be read.
    """
    names = sorted(files)
    with ThreadPoolExecutor(HASHING_THREADS) as pool:
        entries = list(pool.map(lambda name: _fingerprint_entry(epath.Path(files[name])), names))
    return fingerprint_json([list(entry) for entry in zip(names, entries, strict=True)])


def _fingerprint_entry(file: epath.Path) -> Any:
    if is_local(file):
        return _kept_fingerprint(os.path.abspath(file))
    try:
        found = file.stat()
    except OSError as error:
        raise DataError(f"cannot read {os.fspath(file)}: {error.strerror or error}") from error
    if file.suffix != ".safetensors" and found.length < MIN_KEPT_BYTES:
        return fingerprint_file(file)
    return [found.length, found.mtime]


def _kept_fingerprint(path: str) -> str:
    """`fingerprint_file`, of a large file from the cache if neither the file's size, its time nor
    its inode changed since its digest was kept."""
    before = _state(path)
    if before is None or before[0] < MIN_KEPT_BYTES:
        return fingerprint_file(path)
    entry = os.path.join(cache_folder(), "fingerprints", f"{fingerprint_bytes(path.encode())}.json")
    kept = read_json(entry)
    if kept.get("path") == path and kept.get("state") == before:
        return kept["sha256"]
    digest = fingerprint_file(path)
    # What was written a moment ago could be written again without another time.
    settled = time.time_ns() - before[1] > SETTLED_NS
    if settled and _state(path) == before:
        text = canonical_json({"path": path, "state": before, "sha256": digest})
        with contextlib.suppress(OSError):  # Without a cache it is only slower.
            write_atomic(entry, text.encode())
    return digest


def _state(path: str) -> list[int] | None:
    """[size, time, inode] of a file; None where there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return [found.st_size, found.st_mtime_ns, found.st_ino]


def canonical_json(value: Any) -> str:
    """The one JSON text of `value`: sorted keys, no spaces, ASCII.

    Raises:
      TypeError: `value` holds something that is not JSON.
      ValueError: `value` holds NaN or an infinity.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def null_if_not_finite(value: Any) -> Any:
    """A JSON value without NaN and infinity, which JSON does not have: they are null."""
    if isinstance(value, Mapping):
        return {name: null_if_not_finite(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [null_if_not_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def fingerprint_json(value: Any) -> str:
    """SHA-256 of `canonical_json(value)`; equal for equal values whatever the order of keys."""
    return fingerprint_bytes(canonical_json(value).encode())


def fingerprint_items(items: Iterable[Any]) -> str:
    """SHA-256 of `canonical_json` of a list, of which one item at a time is a text."""
    digest = hashlib.sha256(b"[")
    for number, item in enumerate(items):
        digest.update(f"{',' if number else ''}{canonical_json(item)}".encode())
    digest.update(b"]")
    return digest.hexdigest()


def read_json(path: epath.PathLike) -> dict[str, Any]:
    """The object in a JSON file; empty where the file is missing or damaged."""
    try:
        value = json.loads(read_bytes(path))
    except (OSError, ValueError, DataError):
        return {}
    return value if isinstance(value, dict) else {}


def write_json(path: epath.PathLike, value: Any) -> None:
    """Write a JSON value for people to read, with null for what is not finite.

    Raises:
      OSError: the file could not be written.
    """
    text = json.dumps(null_if_not_finite(value), indent=1, ensure_ascii=False)
    write_atomic(path, text.encode())


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


def walk(root: epath.PathLike) -> list[tuple[str, list[str], list[str]]]:
    """(path below the root, folders in it, files in it) of every folder, as `os.walk` has them."""
    root = epath.Path(root)
    if is_local(root):
        top = os.fspath(root)
        places = ((os.path.relpath(folder, top), *rest) for folder, *rest in os.walk(top))
        return [("" if place == "." else place, *rest) for place, *rest in places]
    found, waiting = [], [""]
    while waiting:
        place = waiting.pop()
        inside = list((root / place).iterdir())
        folders = [path.name for path in inside if path.is_dir()]
        found.append((place, folders, [path.name for path in inside if path.name not in folders]))
        waiting += [posixpath.join(place, name) for name in folders]
    return found
