"""Replies as they come, in a file that any kill leaves readable."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import threading
from collections.abc import Mapping
from typing import Any

from etils import epath

from mmpo_jax.chat.replies import Outcome, outcome_as_json, outcome_from_json
from mmpo_jax.core.buckets import Mirror, absolute, is_file, local_copy
from mmpo_jax.core.errors import MmpoError
from mmpo_jax.core.files import is_local, read_bytes

log = logging.getLogger(__name__)

FILE = "replies.jsonl"
FORGOTTEN = "forgotten"
"""In a line of a key whose outcome counts no more."""


class Journal:
    """Outcomes by key, on disk: one line for each, written whole at once.

    A line is in the hands of the operating system before `write` returns, so it outlives the
    process. What a kill leaves of a last line is cut off when the journal is opened. Only the
    places of lines are in memory. Several threads may use one journal, but one process.

    A journal in a bucket is written on this machine and copied, see `Mirror`: another machine
    that goes on after a kill asks again what was answered since the last copy.
    """

    def __init__(self, folder: epath.PathLike) -> None:
        """Opens the journal of a folder, which is made.

        Raises:
          MmpoError: another process or client of this machine has its journal open.
          OSError: it cannot be read or written.
        """
        local = local_copy(folder)
        os.makedirs(local, exist_ok=True)
        self.path = os.path.join(os.path.abspath(local), FILE)
        self._lock = threading.Lock()
        self._places: dict[str, tuple[int, int]] = {}
        """Key -> (offset, bytes) of its line."""
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            self._take()
            if not is_local(folder):
                self._fetch(os.path.join(absolute(folder), FILE))
            self._end = self._found = self._scan()
            os.ftruncate(self._file, self._end)
            self._mirror = None if is_local(folder) else Mirror(local, absolute(folder))
        except BaseException:
            os.close(self._file)
            raise

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, key: str) -> bool:
        return key in self._places

    def found(self, key: str) -> bool:
        """Whether the outcome of a key was there when the journal was opened."""
        place = self._places.get(key)
        return place is not None and place[0] < self._found

    def read(self, key: str) -> Outcome | None:
        """The outcome that was written under a key; None where there is none."""
        place = self._places.get(key)
        if place is None:
            return None
        offset, size = place
        return outcome_from_json(json.loads(os.pread(self._file, size, offset)))

    def write(self, key: str, outcome: Outcome) -> None:
        """Adds an outcome, unless the key has one already.

        Raises:
          OSError: the disk is full, or the like; nothing of the line is left then.
        """
        line = _line({"key": key, **outcome_as_json(outcome)})
        with self._lock:
            if key not in self._places:
                self._append(line)
                self._places[key] = self._end - len(line), len(line)

    def forget(self, key: str) -> None:
        """Takes the outcome of a key out, if there is one: a line says that it counts no more.

        Raises:
          OSError: as `write`.
        """
        with self._lock:
            if key in self._places:
                self._append(_line({"key": key, FORGOTTEN: True}))
                del self._places[key]

    def _append(self, line: bytes) -> None:
        try:
            written = 0
            while written < len(line):
                written += os.pwrite(self._file, line[written:], self._end + written)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, self._end)
            raise OSError(error.errno, error.strerror, self.path) from error
        self._end += len(line)

    def close(self) -> None:
        """Lets go of the file; nothing can be read or written any more.

        Raises:
          MmpoError: it cannot be copied to a bucket.
        """
        with self._lock:
            if self._file < 0:
                return
            try:
                if self._mirror is not None:
                    self._mirror.close()
            finally:
                os.close(self._file)
                self._file = -1

    def _fetch(self, remote: str) -> None:
        """Makes the file the one in a bucket, unless it goes on from that, after a kill here."""
        theirs = read_bytes(remote) if is_file(remote) else b""
        if theirs and os.pread(self._file, len(theirs), 0) == theirs:
            return
        os.ftruncate(self._file, 0)
        written = 0
        while written < len(theirs):
            written += os.pwrite(self._file, theirs[written:], written)

    def _take(self) -> None:
        """The journal for this process alone, where the file system has locks."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise MmpoError(f"{self.path}: another process or client has it open") from error
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                raise

    def _scan(self) -> int:
        """Finds the lines; the end of the last whole one."""
        end, damaged = 0, 0
        with open(self.path, "rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    break
                try:
                    entry = json.loads(line)
                    self._places[entry["key"]] = end, len(line)
                    if FORGOTTEN in entry:
                        del self._places[entry["key"]]
                except (ValueError, KeyError, TypeError):
                    damaged += 1
                end += len(line)
        if damaged:
            log.warning("%s: %d damaged lines; what they had is asked again", self.path, damaged)
        return end


def _line(entry: Mapping[str, Any]) -> bytes:
    return json.dumps(entry, allow_nan=False).encode() + b"\n"
