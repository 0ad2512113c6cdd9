"""What becomes of a training that is killed, stopped, damaged, out of disk, or moved elsewhere.

    python benchmarks/reliability.py                  # all of it, half an hour on two quiet cores
    python benchmarks/reliability.py --only sigkill damage --moments 3

Small runs of `mmpo train` on the picture world, on CPU, are disturbed and started again; each is
compared with a run that nothing disturbed: losses and metrics of all steps, and the weights of the
result. Prints Markdown tables. Needs the extra `test`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from helpers import damage  # noqa: E402
from reliability_runs import (  # noqa: E402
    SAVE_EVERY,
    STEPS,
    Distance,
    Run,
    compared,
    finish,
    so_far,
    without_result,
    write_data,
)

from mmpo_jax.checkpoints.folders import BUILTIN  # noqa: E402
from mmpo_jax.checkpoints.orbax import load_checkpoint_params  # noqa: E402
from mmpo_jax.checkpoints.steps import CheckpointError  # noqa: E402
from mmpo_jax.core.trees import flatten  # noqa: E402

FLIPS = 200
DISK = "100m"
"""Size of the disk that is filled."""
FULL = {
    "in the stage that reads the data": "",
    "before a checkpoint": f"step {2 * SAVE_EVERY + 1}/",
    "before the result is saved": f"checkpoints/{STEPS}",
}
"""When the disk is filled -> what is waited for: a line, a folder, or nothing."""
MESHES = {
    "1 device": {"fsdp": 1},
    "2 devices, fsdp 2": {"fsdp": 2},
    "2 devices, tensor 2": {"fsdp": 1, "tensor": 2},
    "4 devices, fsdp 2, tensor 2": {"fsdp": 2, "tensor": 2},
    "8 devices, fsdp 8": {"fsdp": 8},
    "8 devices, data 2, fsdp 2, tensor 2": {"data": 2, "fsdp": 2, "tensor": 2},
}
Row = tuple[str, ...]


class Cases:
    """The kinds of trouble, each of which gives the rows of a table."""

    def __init__(self, folder: Path, moments: int, seed: int):
        """
        Args:
          folder: to work in.
          moments: at which runs are killed, and stopped.
          seed: of the moments.
        """
        self.folder, self.moments, self.seed = folder, moments, seed
        self.data = write_data(folder / "data")
        self.whole = folder / "whole"
        if not (self.whole / "model").exists():
            finish(self.data, self.whole)

    def sigkill(self) -> Iterator[Row]:
        """SIGKILL of one of two processes, one start after the other"""
        yield "start", "killed", "when", "the other process", "had gone on from", "metrics so far"
        yield from self._disturbed(signal.SIGKILL)

    def sigterm(self) -> Iterator[Row]:
        """SIGTERM to one of two processes, one start after the other"""
        yield "start", "told", "when", "both processes", "had gone on from", "metrics so far"
        yield from self._disturbed(signal.SIGTERM)

    def _disturbed(self, number: signal.Signals) -> Iterator[Row]:
        """A run of two processes that is started again and again, until the moments are over."""
        rng, whole = random.Random(self.seed), self._whole_of_two()
        output = self.folder / signal.Signals(number).name.lower()
        # The first moment is before the first step; the others follow each other.
        steps = [0, *sorted(rng.randrange(1, STEPS) for _ in range(self.moments - 1))]
        for start, step in enumerate(steps):
            run, index = Run(self.data, output, 2), rng.randrange(2)
            if step:
                run.wait_until(lambda run=run, step=step: run.step() >= step)
                time.sleep(rng.uniform(0, 0.5))
            else:
                run.wait_for("held out: ")
                time.sleep(rng.uniform(0, 5))
            when = f"after step {run.step()}" if run.step() > 0 else "before step 1"
            run.send(index, number)
            ended = self._ended(run, number, index)
            metrics = so_far(output, whole) if (output / "metrics.jsonl").exists() else "none"
            yield str(start), f"process {index}", when, ended, run.continued_from(), metrics
        last = finish(self.data, output, 2)
        began = last.continued_from()
        yield (
            str(len(steps)),
            "-",
            "to the end",
            "0, 0",
            began,
            f"result: {compared(output, whole)}",
        )

    @staticmethod
    def _ended(run: Run, number: signal.Signals, index: int) -> str:
        """How the processes end of which one got a signal."""
        begun = time.monotonic()
        statuses = run.end()
        if number == signal.SIGKILL:
            return f"ended with {statuses[1 - index]} after {time.monotonic() - begun:.0f} s"
        said = [line for line in run.said().splitlines() if "the same command goes on" in line]
        line = said[-1].partition(": ")[2].partition(";")[0] if said else "-"
        return f"{statuses[0]}, {statuses[1]}: {line}"

    def _whole_of_two(self) -> Path:
        """The folder of an undisturbed run of two processes."""
        output = self.folder / "whole-of-two"
        if not output.exists():
            finish(self.data, output, 2)
        return output

    def damage(self) -> Iterator[Row]:
        """The newest checkpoint damaged"""
        yield "damage", "said", "went on from", "at the end"
        for number, (name, way) in enumerate(damage.DAMAGES.items()):
            output = without_result(self.whole, self.folder / f"damage-{number}")
            way.do(output / "checkpoints" / str(STEPS))
            run = finish(self.data, output)
            told = [line for line in run.warnings(f"checkpoints/{STEPS}") if "assed over" in line]
            said = [re.sub(r"(\. |, )[Pp]assed over .*", "", line) for line in told]
            shown = said[0].replace("|", "/") if said else "nothing"
            yield name, shown, run.continued_from(), compared(output, self.whole)
            shutil.rmtree(output)

    def flips(self) -> Iterator[Row]:
        """Single bits flipped anywhere in the parameters of a checkpoint"""
        yield "what came of it", f"of {FLIPS} flips"
        step = shutil.copytree(self.whole / "checkpoints" / str(STEPS), self.folder / "flips")
        saved = flatten(load_checkpoint_params(str(step)))
        rng = random.Random(self.seed)
        files = sorted(file for file in (step / "params").rglob("*") if file.stat().st_size)
        files = [file for file in files if file.is_file()]
        sizes = [file.stat().st_size for file in files]
        counts = dict.fromkeys(("Orbax cannot read it", "digests differ", "all as saved"), 0)
        counts["read, and other than it was saved"] = 0
        for file in rng.choices(files, sizes, k=FLIPS):
            kept = file.read_bytes()
            damage.flip(file, rng.randrange(8 * len(kept)))
            counts[self._outcome(step, saved)] += 1
            file.write_bytes(kept)
        yield from ((what, str(count)) for what, count in counts.items())

    @staticmethod
    def _outcome(step: Path, saved: dict) -> str:
        try:
            read = flatten(load_checkpoint_params(str(step)))
        except CheckpointError as error:
            seen = "not those that were saved" in str(error)
            return "digests differ" if seen else "Orbax cannot read it"
        same = all(read[path].tobytes() == saved[path].tobytes() for path in saved)
        return "all as saved" if same else "read, and other than it was saved"

    def disk(self) -> Iterator[Row]:
        """A full disk"""
        yield "full", "exit status", "said", "went on from", "at the end"
        for number, when in enumerate(FULL):
            output = self.folder / f"disk-{number}"
            inside = [sys.executable, __file__, "--fill", when, str(self.data), str(output)]
            done = subprocess.run(
                ["unshare", "-rm", *inside], capture_output=True, text=True, check=False
            )
            if done.returncode:
                yield when, "-", f"not done: {done.stderr.strip()[-200:]}", "-", "-"
                continue
            status, said, begun = json.loads(done.stdout.splitlines()[-1])
            yield when, status, said, begun, compared(output, self.whole)

    def meshes(self) -> Iterator[Row]:
        """Going on with other devices"""
        yield "devices", "went on from", "compared with all steps on one device"
        half = self.folder / "half"
        run = Run(self.data, half)
        run.wait_for(f"step {STEPS // 2}/")
        run.send(0, signal.SIGTERM)
        run.end()
        start = BUILTIN["builtin:picture_world"] / "model.safetensors"
        for number, (name, sizes) in enumerate(MESHES.items()):
            output = shutil.copytree(half, self.folder / f"mesh-{number}")
            run = finish(self.data, output, 1, int(name.split()[0]), mesh=sizes)
            ended = compared(output, self.whole)
            if ended != "identical":
                ended = str(Distance.of(output, self.whole, start))
            yield name, run.continued_from(), ended
            shutil.rmtree(output)


CASES: dict[str, Callable[[Cases], Iterator[Row]]] = {
    "sigkill": Cases.sigkill,
    "sigterm": Cases.sigterm,
    "damage": Cases.damage,
    "flips": Cases.flips,
    "disk": Cases.disk,
    "meshes": Cases.meshes,
}


def fill(when: str, data: Path, output: Path) -> None:
    """Trains on a small disk of this process's own, which is filled meanwhile, empties it, goes on,
    and copies the run to `output`. Prints [exit status, what was said, what it went on from]."""
    with tempfile.TemporaryDirectory() as folder:
        mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", folder]
        subprocess.run(mount, check=True)
        disk, notes = Path(folder), output.parent
        if not FULL[when]:
            _fill(disk)
        run = Run(data, disk / output.name, notes=notes)
        if FULL[when].startswith("checkpoints"):
            run.wait_until((run.output / FULL[when]).exists)
        else:
            run.wait_for(FULL[when])
        while not run.is_over():  # also what removed checkpoints leave
            _fill(disk)
            time.sleep(0.005)
        [status] = run.end()
        said = run.said().splitlines()[-1].replace(f"{disk}/{output.name}/", "")
        (disk / "filler").unlink()
        again = finish(data, run.output, notes=notes)
        shutil.copytree(run.output, output)
        subprocess.run(["umount", folder], check=True)
    print(json.dumps([str(status), said, again.continued_from()]))


def _fill(disk: Path) -> None:
    """Takes all space but some kilobytes, in which folders and short files fit."""
    found = os.statvfs(disk)
    free = found.f_bavail * found.f_frsize - 32_768
    with open(disk / "filler", "ab") as file:
        if free > 0:
            os.posix_fallocate(file.fileno(), file.tell(), free)


def print_table(title: str, rows: Iterator[Row]) -> None:
    """A Markdown table, row by row as they come."""
    names = next(rows)
    print(f"\n## {title}\n\n| {' | '.join(names)} |\n|{'---|' * len(names)}", flush=True)
    for row in rows:
        print(f"| {' | '.join(row)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=CASES, default=CASES)
    parser.add_argument(
        "--moments", type=int, default=10, help="to be killed, and to be stopped at"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the moments and of the bits")
    parser.add_argument("--keep", type=Path, help="new folder to work in, which is not removed")
    parser.add_argument("--fill", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.fill:
        when, data, output = options.fill
        fill(when, Path(data), Path(output))
        return
    if options.keep and options.keep.exists() and any(options.keep.iterdir()):
        parser.error(f"--keep {options.keep}: is not empty, and runs there would go on")
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        cases = Cases((options.keep or Path(temporary)).absolute(), options.moments, options.seed)
        for name in options.only:
            print_table(CASES[name].__doc__ or name, CASES[name](cases))
    print(f"\n{(time.monotonic() - begun) / 60:.0f} minutes")


if __name__ == "__main__":
    main()
