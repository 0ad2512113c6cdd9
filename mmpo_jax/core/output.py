"""A command's output: known to be writable before anything is computed, and written by one command
at a time."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import json
import logging
import os
import re
import secrets
import socket
import time
from collections.abc import Iterator

from etils import epath

from mmpo_jax.core.errors import MmpoError
from mmpo_jax.core.files import check_reachable, is_local
from mmpo_jax.core.processes import on_one, several

log = logging.getLogger(__name__)

LOCK = ".mmpo.lock"
"""In a folder while a command writes there, for it alone where the folder is its output, shared
where that is a file in it; the file has a lock of its own, `.<its name>.lock`."""

FOLDERS = re.compile(
    r"adapter|base|best|checkpoints|model|profile|tensorboard|validation|wandb|round-\d+"
    r"|.*\.(parts|images)"
)
FILES = re.compile(
    r"evaluation\.json|metrics\.jsonl|(recipe|rounds|run|timings)\.json|rounds\.txt|report(-\d+)?\.html"
    r"|(responses|scores|best|corrected)\.jsonl"
    r"|(.*\.)?rejected_rows\.jsonl|(.*\.)?selection\.json"
)
"""What commands write into an output folder, as a folder or as a file."""

TRIES, RETRY_SECONDS = 3, 0.05
"""How often a shared lock is asked for, as whoever shares it holds it alone when letting go."""
SHARED_TRIES = 10
"""How often a process looks for the lock of the first one."""


@contextlib.contextmanager
def claimed(output: str, is_file: bool = False) -> Iterator[None]:
    """Holds an output for one command; makes its folder, which goes again if nothing is in it.

    The claim is a lock of the operating system, which ends with the process, however that ends. A
    file's claim keeps others from its folder as an output, but not from other files in it. In a
    bucket there are no locks; there a file is written and removed, so that it is known to work.
    Of several processes the first claims for all; a folder has to be one that all of them see.

    Args:
      output: of a recipe: a folder, or a file.
      is_file: which of the two.

    Raises:
      MmpoError: it cannot be written, something else is in the way, or another command writes it.
    """
    with contextlib.ExitStack() as stack:
        on_one(lambda: stack.enter_context(_claimed(output, is_file)))
        if several() and is_local(output) and not is_file:
            _check_shared(output)
        yield


def _check_shared(folder: str) -> None:
    """
    Raises:
      MmpoError: the folder that the first process claimed is not this process's.
    """
    for _ in range(SHARED_TRIES):
        if os.path.exists(os.path.join(folder, LOCK)):
            return
        time.sleep(1)  # network file systems show new files late
    raise MmpoError(
        f"output: {folder} is not the same folder for all processes; give one that all machines "
        "have, such as a bucket's"
    )


@contextlib.contextmanager
def _claimed(output: str, is_file: bool) -> Iterator[None]:
    """`claimed` for this process."""
    if not is_local(output):
        check_reachable(output)
        _try_bucket(os.path.dirname(output) if is_file else output)
        yield
        return
    check_writable(output, is_file)
    folder, name = os.path.split(os.path.abspath(output))
    if not is_file:
        folder, name = os.path.join(folder, name), ""
    made = _make(folder)
    try:
        _check_names(folder, os.path.splitext(name)[0] if is_file else None)
        with contextlib.ExitStack() as stack:
            stack.enter_context(_locked(os.path.join(folder, LOCK), output, shared=is_file))
            if is_file:
                stack.enter_context(_locked(os.path.join(folder, f".{name}.lock"), output))
            yield
    finally:
        with contextlib.suppress(OSError):  # not empty, as it should be
            for path in made:
                os.rmdir(path)


@contextlib.contextmanager
def claimed_new(folder: str) -> Iterator[None]:
    """`claimed` for a folder that is not there yet.

    Raises:
      MmpoError: as there, or it is there already, or in a bucket.
    """
    if not is_local(folder):
        raise MmpoError(f"{folder}: is in a bucket; give a folder of this machine")
    new = on_one(lambda: is_new(folder))
    with claimed(folder):
        if not new:
            raise MmpoError(f"{folder}: is there already; give a new folder")
        yield


def is_new(folder: str) -> bool:
    """Whether nothing is there, or a claim alone: of this command, or what one left that was
    killed."""
    return not os.path.lexists(folder) or (os.path.isdir(folder) and os.listdir(folder) == [LOCK])


def check_writable(path: str, is_file: bool = False) -> None:
    """
    Args:
      path: of a new folder or file.
      is_file: which of the two.

    Raises:
      MmpoError: nothing of that name could be written: what is above it is a file, or may not be
        written to; or it is of the wrong kind.
    """
    if not is_local(path):
        return
    path = os.path.abspath(path)
    if os.path.isdir(path) and is_file:
        raise MmpoError(f"output: {path} is a folder; a file is to be written there")
    if os.path.lexists(path) and not os.path.isdir(path) and not is_file:
        raise MmpoError(f"output: {path} is a file; a folder is to be written there")
    there = os.path.dirname(path) if is_file else path
    while not os.path.lexists(there):
        there = os.path.dirname(there)
    if not os.path.isdir(there):
        raise MmpoError(f"output: {there} is a file, so {path} cannot be written")
    if not os.access(there, os.W_OK | os.X_OK):
        raise MmpoError(f"output: {there} may not be written to, so {path} cannot be made")


def _make(folder: str) -> list[str]:
    """Makes a folder and those above it; those that were not there, the innermost first."""
    missing = []
    path = folder
    while not os.path.lexists(path):
        missing.append(path)
        path = os.path.dirname(path)
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise MmpoError(f"output: {folder} cannot be made: {error.strerror}") from error
    return missing


def _check_names(folder: str, stem: str | None) -> None:
    """
    Args:
      folder: whose entries are looked at.
      stem: of an output file; only what belongs to it counts then.
    """
    for entry in os.scandir(folder):
        if stem is not None and not entry.name.startswith(f"{stem}."):
            continue
        if FOLDERS.fullmatch(entry.name):
            if not entry.is_dir():
                raise MmpoError(f"output: {entry.path} is a file; a folder is to be written there")
            if not os.access(entry.path, os.W_OK | os.X_OK):
                raise MmpoError(f"output: {entry.path} may not be written to")
        elif FILES.fullmatch(entry.name) and entry.is_dir():
            raise MmpoError(f"output: {entry.path} is a folder; a file is to be written there")


@contextlib.contextmanager
def _locked(path: str, output: str, shared: bool = False) -> Iterator[None]:
    descriptor, has_locks = _take(path, output, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
    try:
        run = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%F %T")}
        os.truncate(descriptor, 0)
        os.write(descriptor, json.dumps(run).encode())
        yield
    finally:
        # While it is held, and by nobody else, and only if it is what lies there: the folder may
        # have been replaced. So another command's lock is never removed.
        with contextlib.suppress(OSError):
            if shared and has_locks:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(descriptor, path):
                os.unlink(path)
        os.close(descriptor)


def _take(path: str, output: str, kind: int) -> tuple[int, bool]:
    """(descriptor of a lock file that is this process's, `LOCK_EX`, or also its, `LOCK_SH`;
    whether its file system has locks)."""
    tries = TRIES
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise MmpoError(f"output: {output} cannot be written: {error.strerror}") from error
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
            if _is_at(descriptor, path):
                return descriptor, True
        except BlockingIOError as error:
            tries -= 1
            if tries and kind == fcntl.LOCK_SH:  # another that shares it may be letting go of it
                os.close(descriptor)
                time.sleep(RETRY_SECONDS)
                continue
            told = _describe(descriptor)
            os.close(descriptor)
            raise MmpoError(
                f"output: another command writes to {output}: {told}; wait for it, or give "
                "another output"
            ) from error
        except OSError as error:
            if error.errno in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                _tell_no_locks(os.path.dirname(path))
                return descriptor, False
            raise
        os.close(descriptor)  # The one before removed it between our opening and locking it.


@functools.cache
def _tell_no_locks(folder: str) -> None:
    """Once: what commands do without locks is up to who starts them."""
    log.warning(
        "output: the file system of %s has no locks: see to it that no other command writes there",
        folder,
    )


def _is_at(descriptor: int, path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _describe(descriptor: int) -> str:
    try:
        run = json.loads(os.pread(descriptor, 4096, 0))
        return f"process {run['pid']} on {run['host']}, since {run['since']}"
    except (ValueError, KeyError, TypeError):  # it has only just begun
        return "one that has just started"


def _try_bucket(output: str) -> None:
    folder = epath.Path(output)
    probe = folder / f".mmpo.{secrets.token_hex(4)}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        probe.unlink()
    except Exception as error:  # whatever the bucket's library raises
        raise MmpoError(f"output: {output} cannot be written: {error}") from error
