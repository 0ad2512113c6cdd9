"""What libtpu is told where there is no TPU, and that it is quiet then."""

import importlib.util
import os
import subprocess
import sys

import pytest

from mmpo_jax.core import libtpu


@pytest.fixture
def environment(monkeypatch):
    """That of a machine with libtpu and without a TPU."""
    for name in (*libtpu.SAYING, *libtpu.NOWHERE):
        monkeypatch.setenv(name, "")  # so that what is set is taken back
        monkeypatch.delenv(name)
    monkeypatch.setattr(libtpu.glob, "glob", lambda pattern: [])
    monkeypatch.setattr(libtpu.importlib.util, "find_spec", lambda name: name)
    return monkeypatch


def told():
    libtpu.quiet_libtpu()
    return {name: os.environ[name] for name in libtpu.NOWHERE if name in os.environ}


def test_without_a_tpu_it_is_told_what_there_would_be(environment):
    assert told() == libtpu.NOWHERE


def test_what_the_environment_says_counts(environment):
    environment.setenv("TPU_WORKER_HOSTNAMES", "a,b")
    assert told() == {"TPU_WORKER_HOSTNAMES": "a,b"}


def test_a_tpu_is_left_alone(environment):
    environment.setattr(libtpu.glob, "glob", lambda pattern: ["/dev/vfio/0"] * ("vfio" in pattern))
    assert told() == {}


def test_without_libtpu_nothing_is_told(environment):
    environment.setattr(libtpu.importlib.util, "find_spec", lambda name: None)
    assert told() == {}


@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="libtpu is not installed")
def test_it_is_quiet(tmp_path):
    """In a process of its own: a library speaks past Python."""
    left = {name: value for name, value in os.environ.items() if name not in libtpu.SAYING}
    code = "from mmpo_jax.cli import start_jax; start_jax()"
    if any(map(libtpu.glob.glob, libtpu.DEVICE_FILES)):
        pytest.skip("there is a TPU, which is somebody's")
    command = [sys.executable, "-c", code]
    options = {"capture_output": True, "text": True, "cwd": tmp_path, "check": True}
    done = subprocess.run(command, env=left | {"MMPO_CACHE": str(tmp_path)}, **options)
    assert "TPU" not in done.stderr
