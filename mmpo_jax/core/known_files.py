"""What was found out about files by reading them, kept while they stay as they are.

A file is known by its path, size, time of change and inode. What is kept lies in `cache_folder()`
and may be lost at any time: then files are read again. Many processes may use it at once.
"""

from __future__ import annotations

import atexit
import collections
import contextlib
import json
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from etils import epath

from mmpo_jax.core.files import SETTLED_NS, cache_folder, fingerprint_file, is_local

FILE = "files.sqlite"
RECENT = 16_384
"""Files that a process knows without asking the cache."""
PENDING = 256
"""Files that are written to the cache together."""
_TIMEOUT = 10.0
"""Seconds to wait for another process that writes."""

State = list[int]
"""Size, time in nanoseconds and inode of a file."""
Facts = Mapping[str, Any]
"""What is known of a file, as JSON."""

_SELECT = "select state, facts from files where path = ?"
_INSERT = "insert or replace into files values (?, ?, ?)"

Result = TypeVar("Result")

_lock = threading.RLock()
_connections: dict[str, sqlite3.Connection] = {}
_recent: collections.OrderedDict[str, tuple[State, Facts]] = collections.OrderedDict()
_pending: dict[str, tuple[State, Facts]] = {}


def state_of(path: epath.PathLike) -> State | None:
    """The state of a file; None where there is none. One in a bucket has no inode."""
    try:
        if is_local(path):
            found = os.stat(path)
            return [found.st_size, found.st_mtime_ns, found.st_ino]
        remote = epath.Path(path).stat()
        return [int(remote.length), int(remote.mtime * 1e9), 0]
    except OSError:
        return None


def recall(path: epath.PathLike) -> Facts:
    """What is known of a file as it is now; empty where nothing is.

    How a file in a bucket is, a process asks once: asking takes as long as reading.
    """
    name = os.fspath(path)
    with _lock:
        known = _recent.get(name)
    if known is not None and not is_local(name):
        return known[1]
    state = state_of(name)
    if known is None or known[0] != state:
        known = recall_all([name]).get(name)
    if state is None or known is None or known[0] != state:
        return {}
    _keep_here(name, *known)
    return known[1]


def recall_all(paths: Iterable[str]) -> dict[str, tuple[State, Facts]]:
    """Path -> (the state it was in, what was known of it then), of those that the cache has."""

    def look_up(database: sqlite3.Connection) -> dict[str, tuple[State, Facts]]:
        rows = (database.execute(_SELECT, (path,)).fetchone() for path in wanted)
        found = ((path, row) for path, row in zip(wanted, rows, strict=True) if row is not None)
        return {path: (json.loads(state), json.loads(facts)) for path, (state, facts) in found}

    with _lock:
        paths = list(paths)
        wanted = [path for path in paths if path not in _pending]
        unwritten = {path: _pending[path] for path in paths if path in _pending}
        return {**unwritten, **_in_cache(look_up, {})}


def remember(path: epath.PathLike, before: State | None, facts: Facts) -> None:
    """Keeps what was found out about a file, beside what was known of it.

    Args:
      path: the file.
      before: its state before it was read; where it has another now, nothing is kept.
      facts: JSON.
    """
    name = os.fspath(path)
    if before is None or (is_local(name) and state_of(name) != before):
        return
    with _lock:
        state, known = _recent.get(name, ([], {}))
        facts = {**known, **facts} if state == before else dict(facts)
        _keep_here(name, before, facts)
        # What was written a moment ago could be written again without another time.
        if time.time_ns() - before[1] > SETTLED_NS:
            _pending[name] = before, facts
        if len(_pending) >= PENDING:
            flush()


def kept_fingerprint(path: epath.PathLike) -> str:
    """SHA-256 of the contents of a file, which is read unless it is known.

    Raises:
      DataError: the file is missing or cannot be read.
    """
    known = recall(path)
    if "sha256" not in known:
        before = state_of(path)
        known = {"sha256": fingerprint_file(path)}
        remember(path, before, known)
    return known["sha256"]


def flush() -> None:
    """Writes what this process found out to the cache."""
    with _lock:
        rows = [(path, json.dumps(s), json.dumps(f)) for path, (s, f) in _pending.items()]
        _pending.clear()
        if rows:
            _in_cache(lambda database: database.executemany(_INSERT, rows), None)


atexit.register(flush)


def _keep_here(name: str, state: State, facts: Facts) -> None:
    with _lock:
        _recent[name] = state, facts
        _recent.move_to_end(name)
        while len(_recent) > RECENT:
            _recent.popitem(last=False)


def _in_cache(action: Callable[[sqlite3.Connection], Result], otherwise: Result) -> Result:
    """What an action in one transaction gives, or the other where the cache cannot be used: then
    files are read again."""
    path = os.path.join(cache_folder(), FILE)
    with _lock:
        try:
            if path not in _connections:
                _connections[path] = _connect(path)
            with _connections[path] as database:
                return action(database)
        except (OSError, sqlite3.OperationalError):  # another process writes all the time, perhaps
            return otherwise
        except sqlite3.DatabaseError:  # damaged
            if path in _connections:
                _connections.pop(path).close()
            with contextlib.suppress(OSError):
                os.unlink(path)
            return otherwise


def _connect(path: str) -> sqlite3.Connection:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    database = sqlite3.connect(path, timeout=_TIMEOUT, check_same_thread=False)
    database.execute("pragma synchronous = off")  # what a power cut takes is found out again
    database.execute(
        "create table if not exists files (path text primary key, state text, facts text)"
    )
    return database
