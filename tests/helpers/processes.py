"""Commands in several real processes, each with a share of eight simulated devices."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
DEVICES = 8

PROCESS = """
import json, os, sys

commands, folder, report = json.loads(sys.argv[1])
written = []

def note(event, arguments):
    if event not in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir"):
        return
    path = arguments[0]
    writes = event != "open" or arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    if writes and isinstance(path, str | bytes) and os.fsdecode(path).startswith(folder + "/"):
        written.append(os.fsdecode(path))

sys.addaudithook(note)
from mmpo_jax import cli

def run_all():
    for command in commands:
        if status := main(command):
            return status
    with open(report, "w") as file:
        json.dump(sorted(set(written)), file)
    return 0

main, cli.main = cli.main, run_all
cli.run()
"""
"""Runs commands one after another, and reports which files of a folder Python wrote."""


class Running:
    """The processes of some commands, which all of them run."""

    def __init__(self, commands, folder, count, program=PROCESS):
        """
        Args:
          commands: arguments of `mmpo`.
          folder: of what they write.
          count: of the processes.
          program: that each runs.
        """
        self.reports = [Path(f"{folder}.process-{index}.json") for index in range(count)]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        self.processes = []
        for index, report in enumerate(self.reports):
            flags = f"--xla_force_host_platform_device_count={DEVICES // count}"
            environment = os.environ | {
                "PYTHONPATH": str(ROOT),
                "JAX_PLATFORMS": "cpu",
                "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}",
            }
            if count > 1:
                environment |= {
                    "JAX_COORDINATOR_ADDRESS": address,
                    "JAX_NUM_PROCESSES": str(count),
                    "JAX_PROCESS_ID": str(index),
                }
            given = json.dumps([commands, str(folder), str(report)])
            self.processes.append(
                subprocess.Popen(
                    [sys.executable, "-c", program, given],
                    env=environment,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )

    def wait(self, seconds=1800):
        """(exit status, stdout, stderr) of every process."""
        try:
            said = [process.communicate(timeout=seconds) for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()
        statuses = [process.returncode for process in self.processes]
        return [(status, *texts) for status, texts in zip(statuses, said, strict=True)]


def run(commands, folder, count):
    """Runs commands that succeed; which files of the folder each process wrote."""
    running = Running(commands, folder, count)
    ended = running.wait()
    for index, (status, out, err) in enumerate(ended):
        assert status == 0, f"process {index}: {status}\n{out}\n{err[-6000:]}"
    return [json.loads(report.read_text()) for report in running.reports], ended
