"""Metrics of steps put together, and where they go: JSON lines, TensorBoard, the console."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TextIO

import numpy as np
import tensorboardX

from mmpo_jax.core import progress
from mmpo_jax.core.buckets import Mirror, is_file, local_copy
from mmpo_jax.core.errors import MmpoError
from mmpo_jax.core.files import is_local, null_if_not_finite, read_bytes
from mmpo_jax.core.processes import on_one
from mmpo_jax.objectives.sums import WeightedSum

FILE = "metrics.jsonl"
EVENTS = "tensorboard"
"""Folder of TensorBoard's events."""
MAX_QUEUE = 100_000
"""Events that wait to be written, at most: more than come between two lines."""
HELD_OUT = "eval_"
"""What stands in front of the names of metrics of held-out rows."""
MEASURED = "perf/"
"""What the names begin with of all that clocks and devices say. It is another every time; all else
in a line is the same bytes in a run that was stopped as in one that was not."""


def means(steps: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """What the metrics of steps say together, by name.

    Numbers are averaged over the steps, weighted sums over all that they count in any step; where
    they count nothing, the name is left out. As in TRL's trainer of single responses, the margin of
    rewards is the difference of their means where no pairs give one.

    Args:
      steps: `terms.Metrics` each, on the host, all with the same names.
    """
    found = {}
    for name in steps[0]:
        values = [step[name] for step in steps]
        pairs = np.array([x if isinstance(x, WeightedSum) else (x, 1) for x in values], np.float64)
        total, weight = pairs[pairs[:, 1] > 0].sum(axis=0)
        if weight:
            found[name] = float(total / weight)
    if {"rewards/chosen", "rewards/rejected"} <= found.keys():
        found.setdefault("rewards/margins", found["rewards/chosen"] - found["rewards/rejected"])
    return found


def reproducible(row: Mapping[str, float]) -> dict[str, float]:
    """A line of `metrics.jsonl` without what is measured."""
    return {name: value for name, value in row.items() if not name.startswith(MEASURED)}


class Tracker(Protocol):
    """Where metrics go beside the run's folder."""

    def log(self, row: Mapping[str, float]) -> None:
        """A line of `metrics.jsonl`."""

    def close(self) -> None:
        """There will be no more."""


def as_json(steps: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Metrics of steps, on the host, as JSON; what is not finite is null."""

    def value(number: Any) -> Any:
        parts = number if isinstance(number, WeightedSum) else [number]
        found = null_if_not_finite([float(part) for part in parts])
        return found if isinstance(number, WeightedSum) else found[0]

    return [{name: value(number) for name, number in step.items()} for step in steps]


def from_json(steps: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Metrics of which `as_json` made this, with NaN for null."""

    def number(value: Any) -> Any:
        if isinstance(value, list):
            return WeightedSum(*(number(part) for part in value))
        return math.nan if value is None else value

    return [{name: number(value) for name, value in step.items()} for step in steps]


class MetricsWriter:
    """Writes `metrics.jsonl` and TensorBoard events; lines after the resumed step are dropped, all
    of them where it is -1. Of several processes the first writes, and all know the lines.

    For a folder in a bucket they are written on this machine and copied, see `Mirror`.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        resumed_step: int,
        total_steps: int,
        track: Callable[[str], Tracker | None] = lambda folder: None,
    ):
        """
        Args:
          folder: of the run.
          resumed_step: that is gone on from.
          total_steps: of the whole run.
          track: opens a tracker, if there is to be one, in the first process alone; is given the
            folder of this machine in which it may keep files.
        """
        self.total = total_steps
        self.file: TextIO | None = None
        self.events: Any = None
        self.mirror: Mirror | None = None
        self.tracker: Tracker | None = None
        self.rows = on_one(lambda: self._open(folder, resumed_step, track))

    def _open(
        self,
        folder: str | os.PathLike[str],
        resumed_step: int,
        track: Callable[[str], Tracker | None],
    ) -> list[dict[str, float]]:
        """Opens the files; the lines that stay."""
        rows = read_metrics(os.path.join(folder, FILE))
        local = local_copy(folder)
        if not is_local(folder):
            rows = _with_uncopied(rows, read_metrics(os.path.join(local, FILE)))
            shutil.rmtree(local, ignore_errors=True)  # of a run that was killed
        rows = [row for row in rows if row["step"] <= resumed_step]
        os.makedirs(local, exist_ok=True)
        path = os.path.join(local, FILE)
        with open(path + ".new", "w") as file:
            for row in rows:
                self._write(file, row)
        os.replace(path + ".new", path)
        self.file = open(path, "a", buffering=1)  # noqa: SIM115 (closed by close())
        self.events = tensorboardX.SummaryWriter(
            os.path.join(local, EVENTS), purge_step=resumed_step + 1, max_queue=MAX_QUEUE
        )
        self.tracker = track(local)
        if not is_local(folder):
            self.mirror = Mirror(local, os.fspath(folder))
        return rows

    @staticmethod
    def _write(file: TextIO, row: Mapping[str, float]) -> None:
        """A line of JSON, which has no NaN and no infinity: they are null."""
        file.write(json.dumps(null_if_not_finite(row), allow_nan=False) + "\n")

    def record(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes a line, and says nothing on the terminal.

        Raises:
          MmpoError: TensorBoard's events cannot be written.
          OSError: the line cannot.
        """
        if self.file is None:
            return
        if not self._writes_events():
            raise MmpoError(
                f"{self.events.logdir}: events cannot be written any more: the disk is full, or "
                "the like; the same command goes on from the last checkpoint"
            )
        row = {"step": step, **metrics}
        self._write(self.file, row)
        for name, value in metrics.items():
            self.events.add_scalar(name, value, step)
        if self.tracker is not None:
            self.tracker.log(row)

    def write_step(self, step: int, metrics: Mapping[str, float]) -> None:
        """
        Args:
          step: updates done.
          metrics: name -> value, TRL's names, and what is measured.
        """
        self.record(step, metrics)
        seconds = metrics[f"{MEASURED}step_time"]
        shown = {
            "loss": "loss",
            "rewards/accuracies": "acc",
            "rewards/margins": "margin",
            "reward": "reward",
        }
        text = "  ".join(f"{s} {metrics[n]:.4g}" for n, s in shown.items() if n in metrics)
        rate = 1 / seconds if seconds else math.inf
        left = progress.duration((self.total - step) * seconds)
        print(f"step {step}/{self.total}  {text}  {rate:.3g} steps/s  {left} left", flush=True)
        progress.spoken()

    def _writes_events(self) -> bool:
        """Whether the thread is alive that writes events; a full disk ends it, and whoever waited
        for it then would wait for ever."""
        return self.events.file_writer.event_writer._worker.is_alive()

    def flush(self) -> None:
        """Copies to a bucket what is written so far, so that a checkpoint has its lines there."""
        if self.mirror is not None:
            self.mirror.copy()

    def close(self) -> None:
        """
        Raises:
          MmpoError: the files cannot be copied to a bucket.
        """
        if self.file is not None:
            if self._writes_events():
                self.events.close()
            else:  # nor does the end of the process wait for it
                self.events.file_writer.event_writer._event_queue.cancel_join_thread()
            self.file.close()
        if self.tracker is not None:
            self.tracker.close()
        if self.mirror is not None:
            self.mirror.close()
            shutil.rmtree(self.mirror.local, ignore_errors=True)


def _with_uncopied(
    rows: list[dict[str, float]], local: list[dict[str, float]]
) -> list[dict[str, float]]:
    """The lines in a bucket, with those behind them that the last start left on this machine."""

    def text(lines: Sequence[Mapping[str, float]]) -> str:
        return json.dumps([null_if_not_finite(line) for line in lines])

    return local if rows and text(local[: len(rows)]) == text(rows) else rows


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, float]]:
    """The rows of a `metrics.jsonl`, with NaN for null; a line cut off by a kill is left out."""
    rows = []
    for line in read_bytes(path).splitlines() if is_file(path) else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        rows.append({k: math.nan if v is None else v for k, v in row.items()})
    return rows
