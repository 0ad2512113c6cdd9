"""`mmpo -h` answers at once: nothing heavy is loaded for it."""

import subprocess
import sys

import pytest

HEAVY = ("jax", "flax", "transformers", "orbax", "grain", "pyarrow", "torch", "numpy", "pydantic")
HELP = """
import sys
from mmpo_jax import cli
try:
    cli.main(sys.argv[1:])
finally:
    print("loaded:", *[name for name in {heavy} if name in sys.modules], file=sys.stderr)
"""


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["train"],
        ["plan"],
        ["generate"],
        ["select"],
        ["serve"],
        ["correct"],
        ["objectives"],
        ["data"],
        ["data", "check"],
    ],
    ids=str,
)
def test_help_loads_nothing_heavy(arguments):
    command = [sys.executable, "-c", HELP.format(heavy=HEAVY), *arguments, "-h"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "usage: mmpo" in done.stdout
    assert done.stderr == "loaded:\n"
