"""A program that runs a shell command for as long as its own standard input is open.

Whoever starts it holds the other end, so the command ends with that process, whatever killed it:

    python guard.py SECONDS LOG COMMAND

The first line of the input is a secret, or empty: arguments would show it to everybody. The program
prints the id of the command's process group, or why there is none. What the command prints is added
to the log, where `[key]` stands for the secret, behind a line that says which start it is where an
earlier one is in it. When the input ends, the group gets SIGTERM, and
what is left of it after so many seconds SIGKILL.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from typing import BinaryIO

LOOKS = 0.05
"""Seconds between two looks whether a group has ended."""

HIDDEN = "[key]"
"""What stands in texts in a secret's place."""

STARTED = "--- start "
"""Beginning of the line between what earlier starts have said and what this one says."""

REST = 2.0
"""Seconds for what a command that has ended still has to say, by processes that it leaves."""


def main() -> None:
    """Ends with the status of the command, as shells give it."""
    seconds, log_file, command = float(sys.argv[1]), sys.argv[2], sys.argv[3]
    secret = sys.stdin.buffer.readline().rstrip(b"\n")
    try:
        log = open(log_file, "ab", buffering=0)  # noqa: SIM115, as long as the program
        log.write(_line_between(log_file))
        child = subprocess.Popen(
            ["/bin/sh", "-c", command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if secret else log,
            stderr=subprocess.STDOUT,
            process_group=0,
        )
    except OSError as error:
        print(error.strerror, flush=True)
        sys.exit(1)
    print(child.pid, flush=True)
    copying = threading.Thread(target=_copy, args=(child.stdout, log, secret), daemon=True)
    copying.start()
    ending = threading.Thread(target=_end_with_input, args=(child.pid, seconds), daemon=True)
    ending.start()
    status = child.wait()
    if _input_ended.is_set():
        ending.join()
    copying.join(REST)
    os._exit(status if status >= 0 else 128 - status)


def _line_between(log_file: str) -> bytes:
    """What begins this start in a log that has earlier ones; nothing in an empty one."""
    starts, last = 1, b""
    with open(log_file, "rb") as file:
        for last in file:
            starts += last.startswith(STARTED.encode())
    if not last:
        return b""
    told = time.strftime(f"{STARTED}{starts + 1}, %Y-%m-%d %H:%M:%S UTC\n", time.gmtime())
    return (b"" if last.endswith(b"\n") else b"\n") + told.encode()


def _copy(said: BinaryIO | None, log: BinaryIO, secret: bytes) -> None:
    """Adds what is said to the log as it comes, without the secret, also where that comes in
    pieces."""
    held = b""
    while said is not None and (data := os.read(said.fileno(), 1 << 16)):
        held = (held + data).replace(secret, HIDDEN.encode())
        most = min(len(secret) - 1, len(held))
        begun = next((n for n in range(most, 0, -1) if held.endswith(secret[:n])), 0)
        log.write(held[: len(held) - begun])
        held = held[len(held) - begun :]
    log.write(held)


_input_ended = threading.Event()


def _end_with_input(group: int, seconds: float) -> None:
    while os.read(0, 4096):
        pass
    _input_ended.set()
    deadline = time.monotonic() + seconds
    try:
        os.killpg(group, signal.SIGTERM)
        while time.monotonic() < deadline:
            time.sleep(LOOKS)
            os.killpg(group, 0)  # an error once nobody is left
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        pass


if __name__ == "__main__":
    main()
