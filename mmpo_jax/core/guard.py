"""A program that runs a shell command for as long as its own standard input is open.

Whoever starts it holds the other end, so the command ends with that process, whatever killed it:

    python guard.py SECONDS LOG COMMAND

It prints the id of the command's process group, and what the command prints is added to the log.
When the input ends, the group gets SIGTERM, and what is left of it after so many seconds SIGKILL.
"""

import os
import signal
import subprocess
import sys
import threading
import time

LOOKS = 0.05
"""Seconds between two looks whether a group has ended."""


def main() -> None:
    """Ends with the status of the command, as shells give it."""
    seconds, log_file, command = float(sys.argv[1]), sys.argv[2], sys.argv[3]
    with open(log_file, "ab") as log:
        child = subprocess.Popen(
            ["/bin/sh", "-c", command],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            process_group=0,
        )
    print(child.pid, flush=True)
    ending = threading.Thread(target=_end_with_input, args=(child.pid, seconds), daemon=True)
    ending.start()
    status = child.wait()
    if _input_ended.is_set():
        ending.join()
    os._exit(status if status >= 0 else 128 - status)


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
