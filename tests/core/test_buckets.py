"""Folders in a bucket are replaced, copied and removed as those of this machine are."""

import os
import time

import pytest
from helpers import buckets

from mmpo_jax.core import buckets as module
from mmpo_jax.core.buckets import (
    Mirror,
    absolute,
    copy_folder,
    entries,
    is_file,
    is_folder,
    local_copy,
    move,
    remove_tree,
    replace_folder,
)
from mmpo_jax.core.errors import MmpoError
from mmpo_jax.core.files import cache_folder


@pytest.fixture(params=["local", "bucket"])
def root(request, monkeypatch, tmp_path):
    """An empty folder, on this machine or in a bucket."""
    if request.param == "local":
        return str(tmp_path)
    buckets.empty_bucket(monkeypatch)
    return "gs://bucket/root"


def write(folder, names):
    for name in names:
        path = os.path.join(folder, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "w") as file:
            file.write(name)


def test_a_folder_is_replaced_whole(root):
    target = f"{root}/model"
    for names in (["config.json", "old.txt"], ["config.json", "sub/new.txt"]):
        replace_folder(target, lambda staging, names=names: write(staging, names))
    assert entries(target) == ["config.json", "sub"]
    assert is_file(f"{target}/sub/new.txt") and is_folder(target) and not is_file(target)
    assert entries(root) == ["model"]


def test_what_fails_leaves_the_folder_as_it_was(root):
    target = f"{root}/model"
    replace_folder(target, lambda staging: write(staging, ["config.json"]))

    def fail(staging):
        write(staging, ["other.txt"])
        raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        replace_folder(target, fail)
    assert entries(target) == ["config.json"] and entries(root) == ["model"]


def test_a_half_copied_folder_has_no_marker(monkeypatch):
    """Nor has a half removed one: readers take neither for a checkpoint."""
    system = buckets.empty_bucket(monkeypatch)
    done = []
    copy, rm = module.copy_file, type(system).rm_file
    monkeypatch.setattr(module, "copy_file", lambda a, b: (done.append(b), copy(a, b)))
    names = ["config.json", "a.txt", "z.txt"]
    replace_folder("gs://bucket/model", lambda staging: write(staging, names))
    assert [os.path.basename(file) for file in done] == ["a.txt", "z.txt", "config.json"]
    removed = []
    monkeypatch.setattr(type(system), "rm_file", lambda s, p: (removed.append(p), rm(s, p)))
    remove_tree("gs://bucket/model")
    assert removed[0].endswith("config.json") and not entries("gs://bucket/model")


def test_what_is_not_there(root):
    remove_tree(f"{root}/none")
    assert entries(f"{root}/none") == []
    assert not is_file(f"{root}/none") and not is_folder(f"{root}/none")


def test_a_folder_is_copied(root, tmp_path):
    write(tmp_path / "source", ["a.txt", "b/c.txt"])
    copy_folder(tmp_path / "source", f"{root}/target")
    copy_folder(f"{root}/target", tmp_path / "back")
    assert (tmp_path / "back" / "b" / "c.txt").read_text() == "b/c.txt"


def test_places(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MMPO_CACHE", str(tmp_path / "cache"))
    assert absolute("gs://bucket/run/") == "gs://bucket/run"
    assert absolute("run") == str(tmp_path / "run") and local_copy("run") == "run"
    assert local_copy("gs://bucket/run/") == local_copy("gs://bucket/run")
    assert local_copy("gs://bucket/run").startswith(str(tmp_path / "cache"))
    assert local_copy("gs://bucket/run") != local_copy("gs://bucket/other")


def test_growing_files_are_copied_by_themselves(monkeypatch, tmp_path):
    system = buckets.empty_bucket(monkeypatch)
    monkeypatch.setattr(module, "COPY_SECONDS", 0.01)
    mirror = Mirror(str(tmp_path), "gs://bucket/run")
    write(tmp_path, ["sub/lines.txt"])
    deadline = time.monotonic() + 20
    while not system.exists("gs://bucket/run/sub/lines.txt") and time.monotonic() < deadline:
        time.sleep(0.01)
    (tmp_path / "sub" / "lines.txt").write_text("more")
    mirror.close()
    assert system.cat_file("gs://bucket/run/sub/lines.txt") == b"more"


def test_a_bucket_that_fails_for_a_while(monkeypatch, tmp_path, caplog):
    """Is told of, tried again, and an error only at the end."""
    system = buckets.empty_bucket(monkeypatch)
    write(tmp_path, ["lines.txt"])
    mirror = Mirror(str(tmp_path), "gs://bucket/run")

    def refuse(*args, **options):
        raise PermissionError("403")

    with monkeypatch.context() as patch:
        patch.setattr(type(system), "_open", refuse)
        mirror.copy()
    assert "gs://bucket/run: cannot be written for now: 403" in caplog.text
    mirror.copy()
    assert system.exists("gs://bucket/run/lines.txt")
    write(tmp_path, ["more.txt"])
    waited = []
    monkeypatch.setattr(module.time, "sleep", waited.append)
    monkeypatch.setattr(type(system), "_open", refuse)
    with pytest.raises(MmpoError, match=f"run: cannot be written: 403; .* is in {tmp_path}"):
        mirror.close()
    assert waited == list(module.LAST_WAITS)


def test_the_last_copy_is_tried_again(monkeypatch, tmp_path):
    system = buckets.empty_bucket(monkeypatch)
    write(tmp_path, ["lines.txt"])
    mirror = Mirror(str(tmp_path), "gs://bucket/run")
    monkeypatch.setattr(module, "LAST_WAITS", (0.0, 0.0))
    opening, tries = type(system)._open, iter(range(9))

    def refuse_once(*args, **options):
        if not next(tries):
            raise PermissionError("403")
        return opening(*args, **options)

    monkeypatch.setattr(type(system), "_open", refuse_once)
    mirror.close()
    assert system.exists("gs://bucket/run/lines.txt")


def test_the_cache_is_not_in_a_bucket(monkeypatch):
    monkeypatch.setenv("MMPO_CACHE", "gs://bucket/cache")
    with pytest.raises(MmpoError, match="MMPO_CACHE: gs://bucket/cache: has to be a folder"):
        cache_folder()


@pytest.mark.parametrize("place", ["here", "gs://bucket"])
def test_what_is_moved_replaces_what_is_there(place, tmp_path, monkeypatch):
    buckets.file_bucket(monkeypatch, tmp_path)
    root = tmp_path / "bucket" if place.startswith("gs") else tmp_path / "here"
    name = place if place.startswith("gs") else str(root)
    for folder in ("old", "new"):
        (root / folder).mkdir(parents=True)
        (root / folder / "file").write_text(folder)
    (root / "new" / "more").write_text("more")
    move(f"{name}/old", f"{name}/new")
    assert [path.relative_to(root).as_posix() for path in root.rglob("*")] == ["new", "new/file"]
    assert (root / "new" / "file").read_text() == "old"
    (root / "plain").write_text("plain")
    move(f"{name}/plain", f"{name}/new")
    assert (root / "new").read_text() == "plain"
