"""Whether processes live, and waiting for something with a limit."""

import os
import time

PATIENCE = 60
"""Seconds after which a test has failed."""


def is_alive(pid):
    """Whether a process is there and not only waited for."""
    try:
        os.kill(pid, 0)
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


def wait_until(is_so):
    """Waits until a function says so."""
    deadline = time.monotonic() + PATIENCE
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)
