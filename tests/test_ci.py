"""`.ci/run` never passes without a version of Python that it is to test."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / ".ci" / "run"


@pytest.mark.parametrize("missing", ["3.11", "3.12"])
def test_a_python_that_is_not_there(missing, tmp_path):
    programs, root = tmp_path / "bin", tmp_path / "project"
    programs.mkdir()
    (root / ".ci").mkdir(parents=True)
    shutil.copy(SCRIPT, root / ".ci")
    for name in ("bash", "dirname"):
        (programs / name).symlink_to(shutil.which(name))
    for name in {"make", "python3.11", "python3.12"} - {f"python{missing}"}:
        (programs / name).write_text("#!/bin/sh\nexit 0\n")
        (programs / name).chmod(0o755)
    environment = {"PATH": str(programs), "HOME": str(tmp_path), "PYENV_ROOT": str(tmp_path)}
    run = subprocess.run([root / ".ci" / "run"], env=environment, capture_output=True, text=True)
    assert run.returncode == 1
    assert f"python{missing} on PATH" in run.stderr
    assert os.access(SCRIPT, os.X_OK)
