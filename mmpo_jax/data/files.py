"""Rows of files, and files of rows: JSONL, JSON, Parquet, ArrayRecord, Arrow folders.

* ``.jsonl``, ``.ndjson``, ``.json``: an object a line, or one list of objects, whatever the ending
  says; ``.gz`` behind it is unpacked;
* ``.parquet``: images inside rows as bytes;
* ``.array_record``, ``.arrayrecord``: a JSON object a record;
* a folder: what `datasets` saved to disk, or files of one of the kinds above, in the order of their
  paths, of the split ``train`` or of ``FOLDER#SPLIT``, see `mmpo_jax.data.snapshots`.
"""

import codecs
import contextlib
import gzip
import itertools
import json
import os
import re
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import IO, Any, cast

import pyarrow as pa
import pyarrow.parquet as pq
from array_record.python import array_record_module
from etils import epath

from mmpo_jax.core.errors import DataError
from mmpo_jax.core.files import (
    encode_table,
    fingerprint_json,
    is_local,
    read_bytes,
    write_atomic,
)
from mmpo_jax.core.known_files import kept_fingerprint, state_of
from mmpo_jax.data.skipped import MaybeRow, UnusableRow
from mmpo_jax.data.snapshots import choose_split, data_files, split_path

_BATCH_ROWS = 64  # Rows hold whole images: this is memory, not speed.
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
"""Half of a character as JSON writes it, or an error."""

_JSON = (".jsonl", ".ndjson", ".json")
_SNIFFED = 1 << 16
"""Bytes of a JSON file that may be white space before it begins."""

_TRIED = 20
"""Lines that are looked at where the first one is no JSON."""


def folder_of(path: epath.PathLike) -> epath.Path:
    """The folder that paths in the rows are relative to, where nothing else is said."""
    path, _ = split_path(path)
    return path if path.is_dir() else path.parent


def file_rows(path: epath.PathLike) -> Iterator[tuple[int, MaybeRow]]:
    """Rows with their numbers from 1; in text files, those of lines. A folder's files count on.

    Raises:
      DataError: the file is missing, unreadable or of an unknown kind.
    """
    yield from rows_of(find_files(path), path)


def find_files(path: epath.PathLike) -> list[epath.Path]:
    """The files of a data set, in order.

    Raises:
      DataError: the file or folder is missing, unreadable or of an unknown kind.
    """
    with _named(path):
        return _files(*split_path(path))


def rows_of(files: Iterable[epath.Path], path: epath.PathLike) -> Iterator[tuple[int, MaybeRow]]:
    """Rows of a data set's files, as `file_rows` has them.

    Raises:
      DataError: naming `path`: a file is missing or unreadable.
    """
    with _named(path):
        done = 0
        for file in files:
            number = 0
            for number, row in _READERS[_ending(file.name)](file):
                yield done + number, row
            done += number


def fingerprint_rows(files: Iterable[epath.Path]) -> str:
    """SHA-256 over the contents of a data set's files; of those in a bucket, over sizes and times.

    Raises:
      DataError: a file is missing or cannot be read.
    """
    digests = [
        [file.name, kept_fingerprint(file) if is_local(file) else state_of(file)] for file in files
    ]
    return fingerprint_json(digests)


def count_rows(files: Iterable[epath.Path]) -> int | None:
    """How many rows files have, give or take empty lines; None where only reading them tells."""
    total = 0
    for file in files:
        kind = _ending(file.name)
        if not is_local(file) or kind not in (".parquet", ".jsonl", ".ndjson"):
            return None
        if kind == ".parquet":
            total += pq.ParquetFile(os.fspath(file)).metadata.num_rows
        elif file.name.lower().endswith(".gz"):
            return None
        else:
            with file.open("rb") as lines:
                total += sum(chunk.count(b"\n") for chunk in iter(lambda: lines.read(1 << 22), b""))
    return total


@contextlib.contextmanager
def _named(path: epath.PathLike) -> Iterator[None]:
    """Says which data cannot be read."""
    try:
        yield
    except (OSError, EOFError, zlib.error, pa.ArrowException, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"cannot read {os.fspath(path)}: {reason}") from error


def _files(path: epath.Path, split: str | None) -> list[epath.Path]:
    """The files of a data set: the path itself, or what lies in that folder."""
    if _ending(path.name) not in ("", ".arrow") and not (path.is_dir() and split is not None):
        if split is not None and path.exists():
            raise DataError(f"{os.fspath(path)} is one file and has no splits; leave #{split} out")
        return [path]
    if not path.is_dir():
        kinds = ", ".join(kind for kind in _READERS if kind != ".arrow")
        raise DataError(f"{os.fspath(path)}: data files end in {kinds}; or give a folder")
    if (path / "dataset_dict.json").exists():
        splits = [entry.name for entry in path.iterdir() if (entry / "state.json").exists()]
        path, split = path / choose_split(path, splits, split), None
    if (path / "state.json").exists():
        state = json.loads(read_bytes(path / "state.json"))
        return [path / entry["filename"] for entry in state["_data_files"]]
    return data_files(path, split, lambda name: _KINDS.get(_ending(name)))


def _ending(name: str) -> str:
    """The ending that says how a file is read; empty where none does."""
    ending = os.path.splitext(name.lower().removesuffix(".gz"))[1]
    packed = name.lower().endswith(".gz")
    return ending if ending in _READERS and (not packed or ending in _JSON) else ""


def _json_rows(path: epath.Path) -> Iterator[tuple[int, MaybeRow]]:
    """The rows of a list, or of lines with an object each: by what the file begins with."""
    with _opened(path) as file:
        start = file.read(_SNIFFED).removeprefix(codecs.BOM_UTF8).lstrip()[:1]
        file.seek(0)
        rows = _list_of(file) if start == b"[" else None
        if rows is not None:
            yield from enumerate(map(_object, rows), start=1)
        elif _ending(path.name) != ".json" or _is_lines(file):
            yield from _json_lines(file)
        else:
            yield from _json_list(path, file.read())


def _opened(path: epath.Path) -> IO[bytes]:
    file = path.open("rb")
    if path.name.lower().endswith(".gz"):
        return cast(IO[bytes], gzip.GzipFile(fileobj=file))
    return file


def _is_lines(file: IO[bytes]) -> bool:
    """Whether the first line that is not empty is an object by itself, or half of the first ones
    are, as that one may be damaged; goes back to the start."""
    lines = (isinstance(_parse_any(line), dict) for line in file if line.strip())
    first = next(lines, False)
    found = [first, *([] if first else itertools.islice(lines, _TRIED - 1))]
    file.seek(0)
    return 2 * sum(found) >= len(found)


def _list_of(file: IO[bytes]) -> list[Any] | None:
    """The whole as one list, or None where it is lines the first of which is one; goes back too."""
    whole = _parse_any(file.read())
    file.seek(0)
    return whole if isinstance(whole, list) and any(isinstance(r, dict) for r in whole) else None


def _parse_any(content: bytes) -> Any:
    try:
        return json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return None


def _json_lines(file: IO[bytes]) -> Iterator[tuple[int, MaybeRow]]:
    for number, line in enumerate(file, start=1):
        if line.strip():
            yield number, _parse(line)


def _json_list(path: epath.Path, content: bytes) -> Iterator[tuple[int, MaybeRow]]:
    try:
        rows = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"cannot read {os.fspath(path)}: {error}") from error
    if not isinstance(rows, list):
        raise DataError(f"cannot read {os.fspath(path)}: a {type(rows).__name__} and not a list")
    for number, row in enumerate(rows, start=1):
        yield number, _object(row)


def _parse(line: bytes) -> MaybeRow:
    try:
        return _object(json.loads(line.decode("utf-8-sig")), bool(_SURROGATE.search(line)))
    except json.JSONDecodeError as error:
        return UnusableRow("bad_json", f"{error.msg} at character {error.pos + 1}")
    except (ValueError, RecursionError) as error:
        return UnusableRow("bad_json", str(error))


def _object(value: Any, check_texts: bool = True) -> MaybeRow:
    if not isinstance(value, dict):
        return UnusableRow("bad_json", f"a {type(value).__name__} and not an object")
    if check_texts:
        try:
            _encode(value)
        except UnicodeEncodeError as error:
            return UnusableRow("bad_text", str(error))
    return value


def _parquet_rows(path: epath.Path) -> Iterator[tuple[int, MaybeRow]]:
    with path.open("rb") as file:
        yield from _rows(pq.ParquetFile(file).iter_batches(batch_size=_BATCH_ROWS))


def _arrow_rows(path: epath.Path) -> Iterator[tuple[int, MaybeRow]]:
    with path.open("rb") as file:
        yield from _rows(pa.ipc.open_stream(file))


def _rows(batches: Iterable[pa.RecordBatch]) -> Iterator[tuple[int, MaybeRow]]:
    number = 0
    for batch in batches:
        for start in range(0, batch.num_rows, _BATCH_ROWS):
            for row in batch.slice(start, _BATCH_ROWS).to_pylist():
                number += 1
                yield number, {name: _without_nulls(value) for name, value in row.items()}


def _without_nulls(value: Any) -> Any:
    """A value without the keys of objects that hold null: in columns, every object has the keys of
    all, and null is how one lacks them."""
    if isinstance(value, dict):
        return {name: _without_nulls(one) for name, one in value.items() if one is not None}
    if isinstance(value, list) and any(isinstance(one, dict | list) for one in value):
        return [_without_nulls(one) for one in value]
    return value


def _array_record_rows(path: epath.Path) -> Iterator[tuple[int, MaybeRow]]:
    with tempfile.TemporaryDirectory() as folder:
        local = os.fspath(path)
        if not is_local(path):  # its reader knows no buckets
            local = os.path.join(folder, path.name)
            with path.open("rb") as remote, open(local, "wb") as copy:
                shutil.copyfileobj(remote, copy)
        if not os.path.isfile(local):
            raise FileNotFoundError(2, "No such file or directory", local)
        try:
            reader = array_record_module.ArrayRecordReader(local)
            for number in range(reader.num_records()):
                yield number + 1, _parse(reader.read([number])[0])
            reader.close()  # which tells what was wrong with the file
        except RuntimeError as error:
            raise DataError(f"cannot read {os.fspath(path)}: {error}") from error


_READERS: Mapping[str, Callable[[epath.Path], Iterator[tuple[int, MaybeRow]]]] = {
    ".jsonl": _json_rows,
    ".ndjson": _json_rows,
    ".json": _json_rows,
    ".parquet": _parquet_rows,
    ".array_record": _array_record_rows,
    ".arrayrecord": _array_record_rows,
    ".arrow": _arrow_rows,
}


_KINDS = {kind: ".jsonl" if kind in _JSON else kind for kind in _READERS}
"""Endings -> the one that stands for all that are read alike."""


def write_rows(path: epath.PathLike, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes rows to a file that appears whole, of the kind that its name's ending says.

    Raises:
      DataError: of no kind that is written, or the rows' values do not make columns.
      OSError: the file could not be written.
    """
    path = epath.Path(path)
    kind = path.suffix.lower()
    if kind == ".parquet":
        try:
            table = pa.Table.from_pylist(_same_columns(rows))
        except pa.ArrowException as error:
            raise DataError(f"{os.fspath(path)}: rows that make no table: {error}") from error
        write_atomic(path, encode_table(table))
    elif kind in (".array_record", ".arrayrecord"):
        write_atomic(path, _encode_array_record(rows))
    elif kind in (".jsonl", ".ndjson"):
        write_atomic(path, b"".join(_encode(row) + b"\n" for row in rows))
    else:
        raise DataError(f"{os.fspath(path)}: written are .jsonl, .parquet and .array_record")


def _same_columns(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows with the columns of all; Arrow takes those of the first."""
    kept = list(rows)
    columns = list(dict.fromkeys(name for row in kept for name in row))
    return [{name: row.get(name) for name in columns} for row in kept]


def _encode(row: Mapping[str, Any]) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode()


def _encode_array_record(rows: Iterable[Mapping[str, Any]]) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        file = os.path.join(folder, "rows.array_record")
        writer = array_record_module.ArrayRecordWriter(file, "group_size:1")
        for row in rows:
            writer.write(_encode(row))
        writer.close()
        with open(file, "rb") as written:
            return written.read()
