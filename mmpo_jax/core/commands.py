"""A command of the user's that runs beside ours, such as a server, and ends with it."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping

from mmpo_jax.core import guard
from mmpo_jax.core.errors import MmpoError

GRACE = 30.0
"""Seconds that a command has to end after SIGTERM."""

TAIL = 2000
"""Characters of a log that messages show, at most."""


@contextlib.contextmanager
def running(
    command: str,
    environment: Mapping[str, str],
    log_file: str | os.PathLike[str],
    grace: float = GRACE,
    secret: str | None = None,
) -> Iterator[subprocess.Popen[bytes]]:
    """A shell command that runs while the block does, and not longer.

    It is in a process group of its own, so that Ctrl-C does not reach it before us; when we are
    killed it ends too (`core/guard.py`).

    Args:
      command: for `/bin/sh`.
      environment: of the command.
      log_file: gets what it prints, behind what is there and a line that says which start it is.
      grace: seconds between SIGTERM and SIGKILL.
      secret: what the log must not have; the command knows it by its environment.

    Yields:
      The guard, which ends with the command and its status.

    Raises:
      MmpoError: the log cannot be written, or nothing run.
    """
    process = subprocess.Popen(
        [sys.executable, "-I", guard.__file__, str(grace), os.fspath(log_file), command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
        start_new_session=True,
    )
    assert process.stdin is not None and process.stdout is not None
    with process.stdout:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(f"{secret or ''}\n".encode())
            process.stdin.flush()
        told = process.stdout.readline().decode(errors="replace").strip()
    if not told.isdigit():
        process.kill()
        process.wait()
        why = told or "what runs it was ended"
        raise MmpoError(f"{os.fspath(log_file)}: no command runs whose log this is: {why}")
    group = int(told)
    try:
        yield process
    finally:
        try:
            process.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(grace + 5)
        finally:  # whatever became of the guard
            for end in (functools.partial(os.killpg, group, signal.SIGKILL), process.kill):
                with contextlib.suppress(ProcessLookupError):
                    end()
            process.wait()


def tail_of(log_file: str | os.PathLike[str]) -> str:
    """The end of a log, of its last start alone."""
    with open(log_file, "rb") as file:
        file.seek(0, os.SEEK_END)
        file.seek(max(0, file.tell() - TAIL))
        text = file.read().decode(errors="replace")
    _, mark, started = f"\n{text}".rpartition(f"\n{guard.STARTED}")
    return (started.partition("\n")[2] if mark else text).strip()
