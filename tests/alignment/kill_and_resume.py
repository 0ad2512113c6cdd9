"""Kills `mmpo align` at many moments and compares what comes out with an undisturbed run.

    python tests/alignment/kill_and_resume.py [--kills 10] [--seed 0] [--keep DIR] [--model MODEL]
                                               [key=value ...]

Each kill waits for the line of a planned stage in the output of `mmpo align` and a random moment
longer, then sends SIGKILL to the whole process group; the next start goes on. The kills are spread
over all stages of two rounds. In the end every Parquet file, every model.safetensors and every
metrics.jsonl, but for what is measured, must be the same byte for byte. Exit status 0 if they are.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import queue
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from mmpo_jax.training.metrics import read_metrics, reproducible

ROOT = Path(__file__).parents[2]
ALIGN = "align", str(Path("configs", "picture_world_align.yaml"))
"""The command and its recipe."""
OVERRIDES = (
    "rounds=2",
    "prompts_per_round=300",  # more than one part of a stage
    "data.size=600",
    "sampling.num_samples=2",
    "training.epochs=4",
    "training.max_steps=30",
    "training.batch_size=4",
    "training.log_every=5",
    "training.save_every=10",
    "evaluation.size=32",
)
MOMENTS = (
    "round 0/2, evaluate",
    "round 1/2, generate: 1 of 2",
    "round 1/2, divide",
    "round 1/2, conquer: 1 of 2",
    "round 1/2, pairs",
    "round 1/2, reference",
    "step 10/",
    "step 30/",  # the last one: the model is being saved
    "round 2/2, conquer",
    "round 2/2, train",
    "round 1/2, train",
    "round 1/2, evaluate",
    "round 2/2, generate",
    "round 2/2, divide",
    "round 2/2, pairs",
    "round 2/2, reference",
    "round 2/2, evaluate",
)
"""What a kill waits for, the most telling first: with k kills the first k, in the run's order."""
SHORT = ("divide", "judge", "pairs")
"""Stages that are done in no time: there a kill comes within hundredths of a second."""
PATIENCE = 600
"""Seconds without a line after which the run counts as hung."""


@dataclasses.dataclass
class Kill:
    """One row of the table."""

    last_line: str
    seconds: float
    """Since the start of the process."""


def freeze_code(folder: Path) -> None:
    """A copy of the package and the recipe, so that no edit while this runs looks like a defect."""
    without = shutil.ignore_patterns("__pycache__")
    for name in ("mmpo_jax", "configs"):
        shutil.copytree(ROOT / name, folder / "code" / name, dirs_exist_ok=True, ignore=without)


def start(
    output: Path, model: str, overrides: tuple[str, ...], mmpo: tuple[str, ...] = ALIGN
) -> subprocess.Popen[str]:
    """A command in a process group of its own, both streams in one pipe."""
    code = output.parent / "code"
    command = [sys.executable, "-m", "mmpo_jax.cli", *mmpo, f"output={output}"]
    return subprocess.Popen(
        [*command, f"model={model}", *overrides],
        cwd=code,
        env=os.environ | {"PYTHONPATH": str(code), "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def kill_group(process: subprocess.Popen[str]) -> None:
    """SIGKILL to the process and its children: nothing can be caught or flushed."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def lines_of(process: subprocess.Popen[str]) -> queue.Queue[str | None]:
    """The lines as they come, None at the end; read by a thread, so that waiting has a limit."""
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.put(line.rstrip())
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    return lines


def run(
    output: Path,
    model: str,
    overrides: tuple[str, ...],
    until: tuple[str, ...] = (),
    delay=0.0,
    mmpo: tuple[str, ...] = ALIGN,
) -> tuple[str, Kill]:
    """Runs to the end, or kills `delay` seconds after a line with one of `until` in it.

    Returns:
      (that one of `until`, or nothing where the run ended by itself; the kill or the end).

    Raises:
      RuntimeError: it failed or hung.
    """
    began = time.monotonic()
    process = start(output, model, overrides, mmpo)
    said, last, met = [], "(start)", ""
    try:
        lines = lines_of(process)
        deadline = None
        while True:
            wait = PATIENCE if deadline is None else max(0.0, deadline - time.monotonic())
            try:
                line = lines.get(timeout=wait)
            except queue.Empty:
                if deadline is None:
                    raise RuntimeError(f"no line for {PATIENCE} s after {last!r}") from None
                kill_group(process)
                return met, Kill(last, time.monotonic() - began)
            if line is None:
                break
            said.append(line)
            if line.startswith(("round ", "step ")):
                last = line
            if deadline is None:
                met = next((moment for moment in until if moment in line), "")
                wait = delay / 50 if met.endswith(SHORT) else delay
                deadline = time.monotonic() + wait if met else None
        if process.wait() != 0:
            raise RuntimeError(f"exit status {process.returncode}:\n" + "\n".join(said[-30:]))
        return "", Kill(last, time.monotonic() - began)
    finally:
        kill_group(process)


def in_order_of_the_run(moments: tuple[str, ...]) -> list[str]:
    """A `step` line belongs to the first round's training, which is where it comes up first."""
    stages = (
        *("evaluate", "generate", "divide", "conquer", "judge", "pairs"),
        *("reference", "train", "step"),
    )

    def place(moment: str) -> tuple[int, int, int]:
        words = moment.split()
        if words[0] == "step":
            return 1, stages.index("step"), int(words[1].rstrip("/"))
        # A round is evaluated after its training, the start model (round 0) before everything.
        stage = words[2].rstrip(":")
        at = len(stages) if stage == "evaluate" else stages.index(stage)
        return int(words[1].split("/")[0]), at, 0

    return sorted(moments, key=place)


def result_files(folder: Path) -> dict[str, bytes]:
    """Relative name -> contents of everything that must not depend on the kills."""
    names = ("*.parquet", "model.safetensors", "metrics.jsonl")
    found = (path for name in names for path in folder.rglob(name))
    return {path.relative_to(folder).as_posix(): contents(path) for path in sorted(found)}


def contents(path: Path) -> bytes:
    """The bytes of a file, without what clocks and devices say in a `metrics.jsonl`."""
    if path.name != "metrics.jsonl":
        return path.read_bytes()
    return json.dumps([reproducible(row) for row in read_metrics(path)]).encode()


def compare(ours: dict[str, bytes], theirs: dict[str, bytes]) -> list[str]:
    """What differs, one line each."""
    different = [f"only undisturbed: {name}" for name in sorted(ours.keys() - theirs.keys())]
    different += [f"only killed: {name}" for name in sorted(theirs.keys() - ours.keys())]
    common = sorted(ours.keys() & theirs.keys())
    return different + [f"differs: {name}" for name in common if ours[name] != theirs[name]]


def kill_and_resume(
    folder: Path, kills: int, seed: int, model: str, overrides: tuple[str, ...] = OVERRIDES
) -> tuple[list[Kill], dict[str, bytes], list[str]]:
    """The kills, the files of the undisturbed run, and what differs."""
    rng = random.Random(seed)
    folder = folder.absolute()
    freeze_code(folder)
    _, end = run(folder / "undisturbed", model, overrides)
    print(f"undisturbed: {end.seconds:.0f} s", flush=True)
    killed: list[Kill] = []
    moments, planned = in_order_of_the_run(MOMENTS), MOMENTS[:kills]
    met = "nothing yet"
    while met and len(killed) < kills:
        # A kill may come so late that the next stage is done too: then others take its place.
        ahead = moments[moments.index(met) + 1 :] if met in moments else moments
        targets = [moment for moment in ahead if moment in planned]
        if len(targets) < kills - len(killed):
            targets = ahead
        delay = rng.uniform(0.0, 1.0)
        met, kill = run(folder / "killed", model, overrides, tuple(targets), delay)
        if met:
            killed.append(kill)
            print(f"kill {len(killed):2d}  {kill.seconds:6.1f} s  {kill.last_line}", flush=True)
    if met:
        _, end = run(folder / "killed", model, overrides)
        print(f"to the end: {end.seconds:.0f} s", flush=True)
    expected = result_files(folder / "undisturbed")
    return killed, expected, compare(expected, result_files(folder / "killed"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="folder to work in, which is not removed")
    parser.add_argument("--model", default="builtin:picture_world")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the recipe")
    options = parser.parse_args()
    if not 0 < options.kills <= len(MOMENTS):
        parser.error(f"--kills is 1 to {len(MOMENTS)}")
    with contextlib.ExitStack() as stack:
        folder = options.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        killed, expected, different = kill_and_resume(
            folder,
            options.kills,
            options.seed,
            options.model,
            (*OVERRIDES, *options.overrides),
        )
    models = sum(name.endswith("model.safetensors") for name in expected)
    print(f"\n{'kill':>4}  {'seconds':>7}  last line seen")
    for number, kill in enumerate(killed, start=1):
        print(f"{number:4d}  {kill.seconds:7.1f}  {kill.last_line}")
    print(f"{len(killed)} of {options.kills} kills; {len(expected)} files, {models} models")
    print("\n".join(different) or "identical")
    return 1 if different or len(killed) < options.kills else 0


if __name__ == "__main__":
    sys.exit(main())
