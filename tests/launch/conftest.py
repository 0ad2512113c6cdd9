"""A checkout with launch/ in it, and programs on the PATH that stand in for the clouds' own."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
STAND_IN = Path(__file__).parent / "stand_in.py"
PROGRAMS = ("gcloud", "xpk", "sky", "docker", "kubectl", "uv", "hostname", "mmpo_of_the_tests")
CONFIG = """
project = my-project
zone = us-west4-a   # where v5e is
name = pod
accelerator_type = v5litepod-16
spot = true
secrets = HF_TOKEN WANDB_API_KEY
max_tries = 3
poll_seconds = 0
cluster = my-cluster
image = us-docker.pkg.dev/my-project/images/mmpo
"""


class World:
    """Where a test is: its folder, checkout, programs and hosts."""

    def __init__(self, folder):
        self.folder = folder
        self.checkout = folder / "a check out"  # a blank in it, as on some people's machines
        self.environment = {
            "PATH": f"{folder / 'bin'}:/usr/local/bin:/usr/bin:/bin",
            "HOME": str(folder / "home"),
            "STAND_IN": str(folder),
            "GIT_CONFIG_GLOBAL": os.devnull,
        }

    def make(self):
        shutil.copytree(ROOT / "launch", self.checkout / "launch")
        (self.checkout / "launch" / "config").write_text(CONFIG)
        (self.checkout / ".gitignore").write_text("launch/config\n")
        (self.checkout / "configs").mkdir()
        (self.checkout / "configs" / "recipe.yaml").write_text("model: a\n")
        self.git("init", "--quiet")
        self.git("add", ".")
        (self.folder / "home").mkdir()
        programs = self.folder / "bin"
        programs.mkdir()
        for name in PROGRAMS:
            program = "mmpo" if name == "mmpo_of_the_tests" else name
            script = f'#!/bin/sh\nexec "{sys.executable}" -I -S "{STAND_IN}" {program} "$@"\n'
            (programs / name).write_text(script)
            (programs / name).chmod(0o755)

    def git(self, *words):
        subprocess.run(["git", "-C", self.checkout, *words], check=True)

    def start(self, script, *words, **environment):
        command = ["bash", self.checkout / "launch" / script, *words]
        return subprocess.Popen(
            command,
            cwd=self.checkout,
            env=self.environment | environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, script, *words, status=0, **environment):
        """What a script says, on stdout and on stderr; its status is the one that is expected."""
        process = self.start(script, *words, **environment)
        output, errors = process.communicate(timeout=180)
        assert process.returncode == status, (output, errors)
        return output, errors

    def lay_down(self, **files):
        for name, lines in files.items():
            (self.folder / name).write_text(lines if isinstance(lines, str) else "\n".join(lines))

    def records(self, name):
        file = self.folder / name
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def calls(self, *, of=None):
        """The calls of the clouds' programs, as lists of words."""
        every = [record["call"] for record in self.records("calls")]
        return [call for call in every if of is None or call[0] == of]

    def started(self):
        """Every start of mmpo: host, words, environment."""
        return self.records("mmpo")

    def forget(self):
        for name in ("calls", "mmpo", "uv"):
            (self.folder / name).unlink(missing_ok=True)

    def host(self, worker=0, name="pod"):
        return self.folder / "hosts" / f"{name}-w-{worker}"

    def wait_for_starts(self, number):
        end = time.monotonic() + 120
        while len(self.started()) < number:
            assert time.monotonic() < end, "mmpo was not started"
            time.sleep(0.02)

    def end_everything(self):
        for start in self.started():
            with contextlib.suppress(ProcessLookupError):
                os.kill(start["pid"], signal.SIGKILL)


@pytest.fixture
def world(tmp_path):
    made = World(tmp_path / "world")
    made.folder.mkdir()
    made.make()
    yield made
    made.end_everything()


@pytest.fixture(scope="session")
def installed(tmp_path_factory):
    """The folder of a world in which a TPU of two hosts is there, with mmpo on it."""
    made = World(tmp_path_factory.mktemp("installed"))
    made.make()
    made.run("tpu.sh", "create")
    made.run("tpu.sh", "install")
    made.forget()
    return made.folder


@pytest.fixture
def tpu(installed, tmp_path):
    copied = World(tmp_path / "world")
    shutil.copytree(installed, copied.folder, symlinks=True)
    yield copied
    copied.end_everything()
