"""Folders alike on this machine and in a bucket, where nothing is renamed or appended to."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Any

from etils import epath

from mmpo_jax.core.errors import MmpoError
from mmpo_jax.core.files import cache_folder, fingerprint_bytes, is_local, walk

log = logging.getLogger(__name__)

MARKERS = ("config.json", "adapter_config.json")
"""Files without which nobody takes a folder for a checkpoint: the last to come, the first to go."""
COPY_SECONDS = 30.0
"""Time between two copies of what grows, at least."""
MAX_COPYING = 0.1
"""Share of the time, at most, that goes into such copies."""
LAST_WAITS = (1.0, 4.0, 16.0)
"""Seconds between the tries of the last copy, behind which nothing comes."""


def absolute(path: epath.PathLike) -> str:
    """The whole path of a file or folder; a bucket's has no end but its name."""
    name = os.fspath(path)
    return os.path.abspath(name) if is_local(name) else name.rstrip("/")


def is_file(path: epath.PathLike) -> bool:
    """Whether a file is there."""
    return epath.Path(path).is_file()


def is_folder(path: epath.PathLike) -> bool:
    """Whether a folder is there; in a bucket, whether any file is below it."""
    return epath.Path(path).is_dir()


def entries(folder: epath.PathLike) -> list[str]:
    """Names of what lies in a folder, sorted; none where there is no folder."""
    path = epath.Path(folder)
    return sorted(each.name for each in path.iterdir()) if path.is_dir() else []


def remove_tree(folder: epath.PathLike) -> None:
    """Removes a folder, if it is there, and on this machine as far as that is possible."""
    if is_local(folder):
        shutil.rmtree(folder, ignore_errors=True)
        return
    path = epath.Path(folder)
    for name in MARKERS:
        (path / name).unlink(missing_ok=True)
    if path.exists():
        path.rmtree(missing_ok=True)


def move(source: str, target: str) -> None:
    """Renames a file or folder, in the place of what is there."""
    path = epath.Path(target)
    if path.is_dir():
        remove_tree(target)
    path.unlink(missing_ok=True)
    epath.Path(source).rename(target)


def replace_folder(target: str, write: Callable[[str], Any]) -> None:
    """Puts a folder in place whole: `write(staging)` makes it on this machine.

    On this machine that is beside the target, in whose place it is put by rename. To a bucket
    it is copied from a temporary folder (`TMPDIR`), file by file, `MARKERS` last. What it raises
    passes through; then nothing is left of what it wrote, and the target as it was.
    """
    if not is_local(target):
        with tempfile.TemporaryDirectory(prefix="mmpo-") as folder:
            staging = os.path.join(folder, "staging")
            write(staging)
            remove_tree(target)
            copy_folder(staging, target)
        return
    staging = incomplete(target)
    shutil.rmtree(staging, ignore_errors=True)
    try:
        write(staging)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    put_in_place(staging, target)


def incomplete(target: str) -> str:
    """The folder beside the target, on this machine, in which it is made."""
    return target.rstrip("/") + ".incomplete"


def put_in_place(staging: str, target: str) -> None:
    """Puts a whole folder in the place of the target, both on this machine."""
    shutil.rmtree(target, ignore_errors=True)
    os.replace(staging, target)


def copy_folder(source: epath.PathLike, target: epath.PathLike) -> None:
    """Copies all files of a folder into another, `MARKERS` last."""
    files = [os.path.join(place, name) for place, _, names in walk(source) for name in names]
    for file in sorted(files, key=lambda file: (file in MARKERS, file)):
        copy_file(os.path.join(source, file), os.path.join(target, file))


def copy_file(source: epath.PathLike, target: epath.PathLike) -> None:
    """Copies a file, never more than a piece of it in memory, and makes the folder for it."""
    target = epath.Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    with epath.Path(source).open("rb") as read, target.open("wb") as written:
        shutil.copyfileobj(read, written, 1 << 22)


def local_copy(folder: epath.PathLike) -> str:
    """The folder of this machine that stands for one in a bucket, where that is local itself; in
    `cache_folder()`, the same each time."""
    if is_local(folder):
        return os.fspath(folder)
    digest = fingerprint_bytes(absolute(folder).encode())[:16]
    return os.path.join(cache_folder(), "outputs", digest)


class Mirror:
    """A folder of this machine whose growing files are copied to one in a bucket.

    Objects cannot be appended to, so a file that has changed is copied whole: every
    `COPY_SECONDS` by a thread, less often where that takes more than `MAX_COPYING` of the time,
    when asked to, and at the end. A kill loses what was written since.
    """

    def __init__(self, local: str, remote: str) -> None:
        """
        Args:
          local: the folder.
          remote: folder in a bucket.
        """
        self.local, self.remote = local, remote
        self._copied: dict[str, tuple[int, int]] = {}
        """File -> (size, time) when it was copied last."""
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="mirror", daemon=True)
        self._thread.start()

    def copy(self) -> None:
        """Copies what has changed; says so in the log where that fails, as it is tried again."""
        try:
            self._copy()
        except Exception as error:  # whatever the bucket's library raises
            log.warning("%s: cannot be written for now: %s", self.remote, error)

    def close(self) -> None:
        """Copies what has changed, for the last time, with some patience.

        Raises:
          MmpoError: it cannot be copied.
        """
        self._over.set()
        self._thread.join()
        for wait in (*LAST_WAITS, None):
            try:
                return self._copy()
            except Exception as error:  # whatever the bucket's library raises
                if wait is None:
                    raise MmpoError(
                        f"{self.remote}: cannot be written: {error}; what is missing there is in "
                        f"{self.local}, from where the same command on this machine goes on"
                    ) from error
                log.warning(
                    "%s: cannot be written: %s; tried again in %.0f s", self.remote, error, wait
                )
                time.sleep(wait)

    def _copy(self) -> None:
        with self._lock:
            for place, _, names in walk(self.local):
                for file in (os.path.join(place, name) for name in names):
                    found = os.stat(os.path.join(self.local, file))
                    state = found.st_size, found.st_mtime_ns
                    if self._copied.get(file) != state:
                        copy_file(os.path.join(self.local, file), os.path.join(self.remote, file))
                        self._copied[file] = state

    def _run(self) -> None:
        wait = COPY_SECONDS
        while not self._over.wait(wait):
            begun = time.monotonic()
            self.copy()
            wait = max(COPY_SECONDS, (time.monotonic() - begun) / MAX_COPYING)
