"""Small trainings on the picture world that are started, ended and compared by reliability.py."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from helpers import xla_flags
from helpers.run_files import contents, reproducible_rows
from safetensors.numpy import load_file

from mmpo_jax.picture_world.language import supervised_caption
from mmpo_jax.picture_world.preferences import write_preferences
from mmpo_jax.picture_world.records import prompt_records, scenes

ROOT = Path(__file__).parents[1]
STEPS, SAVE_EVERY, KEPT = 24, 3, 3
PAIRS, BATCH_SIZE = 160, 16
FLAGS = " ".join(xla_flags.known(xla_flags.FLAGS))
"""Flags of XLA's by which it compiles fast, as in the tests."""
NO_AXES: Mapping[str, int] = {}
PATIENCE = 900
"""Seconds after which a run counts as hung."""
SAID = re.compile(r"^step (\d+)/", re.MULTILINE)
SAME = ("metrics.jsonl", "model/model.safetensors", "reference.parquet")
"""Files of a run that must not depend on what it went through."""


def write_data(folder: Path) -> Path:
    """Pairs of a true caption and one with an invented thing; the file."""
    found = zip(prompt_records("align", 0, PAIRS, 48), scenes("align", 0, PAIRS), strict=True)
    rng = np.random.default_rng(0)
    write_preferences(
        str(folder),
        (
            (record, [supervised_caption(scene, rng, rate) for rate in (0.0, 1.0)], scene)
            for record, scene in found
        ),
    )
    return folder / "pairs.jsonl"


def recipe(data: Path, output: Path, mesh: Mapping[str, int]) -> dict[str, Any]:
    """DPO of the parameters of all layers of the tiny model that ships with the package."""
    return {
        "model": "builtin:picture_world",
        "output": str(output),
        "data": {"source": "file", "path": str(data)},
        "lengths": {"prompt": [24], "response": [32]},
        "devices": dict(mesh),
        "training": {
            "objective": {"type": "dpo"},
            # With so large an epsilon a step is in proportion to its gradient; else AdamW makes
            # whole steps of what rounding leaves of gradients that are none.
            "optimizer": {"learning_rate": 4e-3, "epsilon": 0.01, "weight_decay": 0.0},
            "epochs": 8,
            "max_steps": STEPS,
            "batch_size": BATCH_SIZE,
            "log_every": 1,
            "save_every": SAVE_EVERY,
            "keep_checkpoints": KEPT,
        },
        "validation": {"share": 0.1, "every": 6},
    }


class Run:
    """`mmpo train` in one process or several on this machine, which share some CPU devices."""

    def __init__(
        self,
        data: Path,
        output: Path,
        processes: int = 1,
        each: int = 1,
        notes: Path | None = None,
        mesh: Mapping[str, int] = NO_AXES,
    ):
        """
        Args:
          data: file of pairs.
          output: folder of the run.
          processes: of the command.
          each: CPU devices of a process.
          notes: folder of the recipe and of what the processes say; beside the output by default.
          mesh: sizes of its axes, by name.
        """
        self.output, notes = output, notes or output.parent
        path = notes / f"{output.name}.yaml"
        path.write_text(json.dumps(recipe(data, output, mesh)))  # JSON is YAML
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        self.logs = [notes / f"{output.name}.{index}.log" for index in range(processes)]
        self.begun = time.monotonic()
        self.processes = []
        for index, log in enumerate(self.logs):
            environment = {
                "PYTHONPATH": str(ROOT),
                "PYTHONUNBUFFERED": "1",
                "JAX_PLATFORMS": "cpu",
                "XLA_FLAGS": f"{FLAGS} --xla_force_host_platform_device_count={each}",
            }
            if processes > 1:
                environment |= {
                    "JAX_COORDINATOR_ADDRESS": address,
                    "JAX_NUM_PROCESSES": str(processes),
                    "JAX_PROCESS_ID": str(index),
                }
            with open(log, "w") as file:
                self.processes.append(
                    subprocess.Popen(
                        [sys.executable, "-m", "mmpo_jax.cli", "train", str(path)],
                        cwd=ROOT,
                        env=os.environ | environment,
                        stdout=file,
                        stderr=subprocess.STDOUT,
                    )
                )

    def said(self, index: int = 0) -> str:
        """All that a process has said."""
        return self.logs[index].read_text()

    def step(self) -> int:
        """The last step that was reported; -1 before the first process has said anything of it."""
        return max(map(int, SAID.findall(self.said())), default=-1)

    def wait_for(self, text: str) -> None:
        """Waits until the first process has said something, or has ended."""
        self.wait_until(lambda: text in self.said())

    def wait_until(self, is_so: Callable[[], bool]) -> None:
        """Waits until something is so, or the first process has ended.

        Raises:
          RuntimeError: neither comes.
        """
        while not is_so() and not self.is_over():
            self._check()
            time.sleep(0.005)

    def is_over(self) -> bool:
        """Whether the first process has ended."""
        return self.processes[0].poll() is not None

    def send(self, index: int, number: signal.Signals) -> None:
        """Sends a signal to a process."""
        self.processes[index].send_signal(number)

    def end(self) -> list[int]:
        """Waits; the exit statuses."""
        while any(process.poll() is None for process in self.processes):
            self._check()
            time.sleep(0.05)
        return [process.returncode for process in self.processes]

    def _check(self) -> None:
        if time.monotonic() - self.begun > PATIENCE:
            for process in self.processes:
                process.kill()
            raise RuntimeError(f"hung: {self.output}\n{self.said()[-2000:]}")

    def continued_from(self) -> str:
        """The step that it went on from."""
        found = re.search(r"^continuing from step (\d+)$", self.said(), re.MULTILINE)
        return f"step {found[1]}" if found else "the start"

    def warnings(self, word: str) -> list[str]:
        """Lines with a word, the folder of the run left out."""
        return [
            line.replace(f"{self.output}/", "") for line in self.said().splitlines() if word in line
        ]


def finish(
    data: Path,
    output: Path,
    processes: int = 1,
    each: int = 1,
    notes: Path | None = None,
    mesh: Mapping[str, int] = NO_AXES,
) -> Run:
    """Runs to the end.

    Raises:
      RuntimeError: it fails.
    """
    run = Run(data, output, processes, each, notes, mesh)
    statuses = run.end()
    if any(statuses):
        raise RuntimeError(f"{output}: exit statuses {statuses}\n{run.said()[-3000:]}")
    return run


def so_far(ours: Path, theirs: Path) -> str:
    """Whether the metrics of a run's steps so far are those of another, bit for bit."""
    lines = [reproducible_rows(folder / "metrics.jsonl") for folder in (ours, theirs)]
    own = lines[0][: len(lines[1])]
    return "identical" if own == lines[1][: len(own)] else "**differ**"


def compared(ours: Path, theirs: Path) -> str:
    """Whether a run ended as another, bit for bit."""
    different = [name for name in SAME if contents(ours / name) != contents(theirs / name)]
    return "identical" if not different else f"**differs**: {', '.join(different)}"


@dataclasses.dataclass(frozen=True)
class Distance:
    """How near a run ended to another."""

    loss: float
    """Largest difference of the losses of a step."""
    weights: float
    """Largest difference of a weight, over the largest change that training made to one."""

    @classmethod
    def of(cls, ours: Path, theirs: Path, start: Path) -> Distance:
        losses = [
            [json.loads(line)["loss"] for line in _losses(folder)] for folder in (ours, theirs)
        ]
        a, b = (load_file(folder / "model" / "model.safetensors") for folder in (ours, theirs))
        before = load_file(start)
        off = max(float(np.abs(a[name] - b[name]).max()) for name in b)
        change = max(float(np.abs(b[name] - before[name]).max()) for name in b)
        return cls(float(np.abs(np.subtract(*losses)).max()), off / change)

    def __str__(self) -> str:
        return f"losses to {self.loss:.1e}, weights to {self.weights:.1e} of the update"


def _losses(folder: Path) -> list[str]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [line for line in lines if '"loss"' in line]


def without_result(whole: Path, target: Path) -> Path:
    """A copy of a run whose checkpoints are there and whose result is not."""
    shutil.copytree(whole, target)
    shutil.rmtree(target / "model")
    return target
