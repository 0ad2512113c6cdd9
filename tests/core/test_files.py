"""Files: whole tables or none, and fingerprints that are kept only while a file stays as it is."""

import contextlib
import errno
import os
import random

import pyarrow as pa
import pytest

from mmpo_jax.core import files
from mmpo_jax.core.errors import DataError
from mmpo_jax.core.files import (
    decode_table,
    encode_table,
    fingerprint_file,
    fingerprint_files,
    fingerprint_json,
    read_table,
    write_atomic,
    write_table,
)


def test_encoding_depends_on_rows_only():
    whole = pa.table({"a": list(range(10)), "b": [str(i) for i in range(10)]})
    pieces = pa.concat_tables([whole.slice(0, 3), whole.slice(3, 7)])
    assert encode_table(whole) == encode_table(pieces) == encode_table(whole)
    assert decode_table(encode_table(whole), "t").equals(whole)


def test_encoding_does_not_depend_on_chunks_of_long_columns():
    whole = pa.table({"b": [random.Random(row).randbytes(900).hex() for row in range(2000)]})
    pieces = pa.concat_tables([whole.slice(0, 300), whole.slice(300, 1700)])
    assert encode_table(whole) == encode_table(pieces)


def test_no_flipped_bit_in_the_data_goes_unnoticed():
    table = pa.table({"b": [random.Random(row).randbytes(300) for row in range(4)]})
    data = encode_table(table)
    for place in range(1200):
        damaged = data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]
        with contextlib.suppress(DataError):
            assert decode_table(damaged, "t").equals(table), place


def test_write_atomic_keeps_the_old_file_on_failure(tmp_path, monkeypatch):
    path = tmp_path / "new" / "file"
    write_atomic(path, b"old")

    def fail(*arguments):
        raise OSError(errno.EIO, "broken disk")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="broken disk"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert [path.name for path in path.parent.iterdir()] == ["file"]


def test_written_files_have_the_usual_permissions(tmp_path):
    write_atomic(tmp_path / "atomic", b"")
    (tmp_path / "plain").write_bytes(b"")
    assert (tmp_path / "atomic").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_tables_round_trip_and_name_broken_files(tmp_path):
    path, table = tmp_path / "t.parquet", pa.table({"id": ["a", "b"], "score": [0.5, 1.0]})
    write_table(path, table)
    assert read_table(path).equals(table)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"t\.parquet"):
        read_table(path)
    with pytest.raises(DataError, match=r"none\.parquet: No such file"):
        read_table(tmp_path / "none.parquet")


@pytest.fixture
def hashed(tmp_path, monkeypatch):
    """The files whose contents were read for a fingerprint; small ones count as large."""
    monkeypatch.setenv("MMPO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(files, "MIN_KEPT_BYTES", 3)
    read = []
    monkeypatch.setattr(
        files, "fingerprint_file", lambda path: read.append(str(path)) or fingerprint_file(path)
    )
    return read


def age(path, seconds=100):
    """Sets a file's time back, as if it had lain there."""
    then = path.stat().st_mtime_ns - seconds * 10**9
    os.utime(path, ns=(then, then))


def test_fingerprint_of_files(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_bytes(b"1")
    two.write_bytes(b"2")
    first = fingerprint_files({"a": one, "b": two})
    assert fingerprint_files({"b": two, "a": one}) == first
    assert fingerprint_files({"a": two, "b": one}) != first
    assert fingerprint_files({"a": one, "c": two}) != first
    (tmp_path / "link").symlink_to(one)
    assert fingerprint_files({"a": tmp_path / "link", "b": two}) == first
    for function in (fingerprint_file, lambda path: fingerprint_files({"a": path})):
        with pytest.raises(DataError, match="nowhere"):
            function(tmp_path / "nowhere")


def test_digests_of_large_files_are_kept(tmp_path, hashed):
    large, small = tmp_path / "large", tmp_path / "small"
    large.write_bytes(b"12345")
    small.write_bytes(b"12")
    named = {"large": large, "small": small}
    fingerprint_files(named)
    age(large)
    hashed.clear()
    first = fingerprint_files(named)
    assert sorted(hashed) == [str(large), str(small)]  # it had been written a moment ago
    hashed.clear()
    assert fingerprint_files(named) == first
    assert hashed == [str(small)]


@pytest.mark.parametrize("change", ["contents", "time", "another file"])
def test_digests_are_not_kept_over_a_change(tmp_path, hashed, change):
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    age(path)
    before = path.stat().st_mtime_ns
    first = fingerprint_files({"file": path})
    if change == "another file":
        (tmp_path / "new").write_bytes(b"54321")
        os.utime(tmp_path / "new", ns=(before, before))
        os.replace(tmp_path / "new", path)
    else:
        path.write_bytes(b"54321" if change == "time" else b"123456")
    hashed.clear()
    assert fingerprint_files({"file": path}) != first
    assert hashed == [str(path)]


def test_a_damaged_or_missing_cache_only_costs_time(tmp_path, hashed, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    age(path)
    first = fingerprint_files({"file": path})
    (entry,) = (tmp_path / "cache" / "fingerprints").iterdir()
    entry.write_bytes(entry.read_bytes()[:-9])
    assert fingerprint_files({"file": path}) == first
    (tmp_path / "no folder").write_bytes(b"")
    monkeypatch.setenv("MMPO_CACHE", str(tmp_path / "no folder"))
    assert fingerprint_files({"file": path}) == first
    assert len(hashed) == 3


def test_fingerprint_of_json():
    assert fingerprint_json({"a": 1, "b": [2]}) == fingerprint_json({"b": (2,), "a": 1})
    assert fingerprint_json({"a": 1}) != fingerprint_json({"a": 1.5})
    with pytest.raises(TypeError):
        fingerprint_json({"a": object()})
    with pytest.raises(ValueError, match="JSON"):
        fingerprint_json({"a": float("nan")})


@pytest.mark.parametrize("items", [[], ["ü"], [{"b": 1, "a": [0.1, None]}, [], "x" * 100]])
def test_a_list_has_one_fingerprint_however_it_is_fed(items):
    assert files.fingerprint_items(iter(items)) == fingerprint_json(items)
