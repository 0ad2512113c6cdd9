"""A DPO step with splash attention compiles for TPUs that are not there."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
COMPILE = """
import json, sys
import compile_for_tpu as script
from helpers import tiny

script.REMAT = "dots"
target = script.Target(tiny.make_config, prompt=40, slots=2, train_mesh=(1, 2, 2))
devices = script.topology("v5e:2x2")
print(json.dumps(script.measure(target, "DPO step", devices, sys.argv[1])))
"""


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="the compiler for TPUs is not installed: pip install libtpu",
)
def test_a_dpo_step_compiles_for_tpu(tmp_path):
    program = tmp_path / "program.txt"
    # A process of its own: the environment of JAX is set before it is imported.
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, str(program)],
        env={"PATH": "", "PYTHONPATH": f"{BENCHMARKS}:{Path(__file__).parents[1]}"},
        cwd=BENCHMARKS.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "splash" not in done.stderr  # it would say why another one is used
    row = json.loads(done.stdout.splitlines()[-1])
    assert row["mesh"] == "1 x 2 x 2"
    assert 0 < row["total"] < 1
    # Each once: with the policy "dots" the forward kernel does not run again in the backward pass.
    assert row["kernels"] == ["dkv", "dq", "fwd"]
