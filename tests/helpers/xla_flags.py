"""XLA's flags for the tests: those that the installed jaxlib has, as it aborts at any other."""

import os
import re
import subprocess
import sys

FLAGS = (
    # Here compiling takes far longer than running: these make it about ten times faster.
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_use_fusion_emitters=false",  # of older jaxlibs
    # Eight devices wait for each other on as many threads: on a busy machine for long.
    "--xla_cpu_collective_call_warn_stuck_timeout_seconds=120",
    "--xla_cpu_collective_call_terminate_timeout_seconds=600",
    "--xla_cpu_collective_timeout_seconds=600",
)
PARSE = "from jaxlib import xla_client; xla_client.CompileOptions()"
"""The least that makes XLA read its flags."""


def known(flags: tuple[str, ...]) -> tuple[str, ...]:
    """Those of `flags` that the installed jaxlib has; a process of its own is what XLA aborts.

    Raises:
      RuntimeError: XLA does not start, and not for an unknown flag.
    """
    environment = os.environ | {"XLA_FLAGS": " ".join(flags)}
    command = [sys.executable, "-c", PARSE]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    if run.returncode == 0:
        return flags
    said = re.search(r"Unknown flags? in XLA_FLAGS: (.*)", run.stderr)
    if not said:
        raise RuntimeError(f"XLA does not start:\n{run.stderr}")
    unknown = said[1].split()
    return tuple(flag for flag in flags if flag not in unknown)
