"""How the process of a command ends: with all its words said, its status, and at once."""

import subprocess
import sys

PROCESS = """
import atexit, os, sys, threading
from mmpo_jax import cli
atexit.register(print, "at exit")
if "pool" in sys.argv:
    from concurrent.futures import ThreadPoolExecutor
    ThreadPoolExecutor(1).submit(print, "done").result()  # whose thread goes on waiting for more
if "waits" in sys.argv:
    threading.Timer(0.5, print, ["a thread is over"]).start()
cli.main = lambda: print("said") or 3
cli.run()
"""


def ended(*arguments):
    command = [sys.executable, "-c", PROCESS, *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.splitlines(), done.returncode


def test_all_is_said_and_what_is_registered_runs():
    assert ended() == (["said", "at exit"], 3)


def test_threads_are_waited_for():
    said, status = ended("waits")
    assert sorted(said) == ["a thread is over", "at exit", "said"] and status == 3


def test_pools_that_nobody_has_ended_end():
    """As the one by which grain makes batches ready."""
    assert ended("pool") == (["done", "said", "at exit"], 3)


def test_status_of_the_command():
    command = [sys.executable, "-m", "mmpo_jax.cli", "objectives"]
    good = subprocess.run([*command, "dpo"], capture_output=True, text=True)
    assert good.returncode == 0 and "dpo" in good.stdout
    bad = subprocess.run([*command, "nothing"], capture_output=True, text=True)
    assert bad.returncode == 1 and "nothing" in bad.stderr
