"""What is known of files: while they stay as they are, and not a moment longer."""

import os

import pytest

from mmpo_jax.core import known_files
from mmpo_jax.core.known_files import FILE, flush, recall, recall_all, remember, state_of

LONG_AGO = 1_000_000_000


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MMPO_CACHE", str(tmp_path / "cache"))
    forget(monkeypatch)
    return tmp_path / "cache"


def forget(monkeypatch):
    """As in a new process."""
    monkeypatch.setattr(known_files, "_recent", type(known_files._recent)())
    monkeypatch.setattr(known_files, "_pending", {})


def old_file(path, content=b"a"):
    path.write_bytes(content)
    os.utime(path, ns=(LONG_AGO, LONG_AGO))
    return path


def test_what_is_known_is_known_in_another_process(cache, tmp_path, monkeypatch):
    file = old_file(tmp_path / "a")
    remember(file, state_of(file), {"size": [1, 2]})
    remember(file, state_of(file), {"sha256": "b"})
    flush()
    forget(monkeypatch)
    assert recall(file) == {"size": [1, 2], "sha256": "b"}
    assert recall_all([str(file), "gone"]) == {
        str(file): (state_of(file), {"size": [1, 2], "sha256": "b"})
    }


@pytest.mark.parametrize("forgotten", [True, False])
def test_a_file_that_changed_is_not_known(cache, tmp_path, monkeypatch, forgotten):
    file = old_file(tmp_path / "a")
    remember(file, state_of(file), {"sha256": "b"})
    flush()
    if forgotten:
        forget(monkeypatch)
    os.utime(file, ns=(LONG_AGO, LONG_AGO + 1))
    assert recall(file) == {}
    file.unlink()
    assert recall(file) == {}


def test_a_file_that_changes_while_it_is_read_is_not_known(cache, tmp_path):
    file = old_file(tmp_path / "a")
    before = state_of(file)
    old_file(file, b"other")
    remember(file, before, {"sha256": "b"})
    assert recall(file) == {}


def test_a_file_of_this_moment_is_known_in_this_process_only(cache, tmp_path, monkeypatch):
    file = tmp_path / "a"
    file.write_bytes(b"a")
    remember(file, state_of(file), {"sha256": "b"})
    flush()
    assert recall(file) == {"sha256": "b"}
    forget(monkeypatch)
    assert recall(file) == {}


def test_a_damaged_cache_is_made_again(cache, tmp_path, monkeypatch):
    cache.mkdir()
    (cache / FILE).write_bytes(b"no database, but as long as one" * 100)
    file = old_file(tmp_path / "a")
    for _ in range(2):  # the first finds the damage
        remember(file, state_of(file), {"sha256": "b"})
        flush()
    forget(monkeypatch)
    assert recall(file) == {"sha256": "b"}


def test_without_a_cache_nothing_fails(cache, tmp_path, monkeypatch):
    cache.write_bytes(b"a file where the folder should be")
    file = old_file(tmp_path / "a")
    remember(file, state_of(file), {"sha256": "b"})
    flush()
    forget(monkeypatch)
    assert recall(file) == {}
