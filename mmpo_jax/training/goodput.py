"""What share of a run's time went into steps that were kept, over all of its starts."""

from __future__ import annotations

import dataclasses
import json
import os
import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Any

from mmpo_jax.core.files import fingerprint_json, read_json, write_atomic
from mmpo_jax.core.processes import on_one
from mmpo_jax.training.metrics import MEASURED

FILE = "run.json"
"""In a run's folder: when it was first started, and by which id trackers know it. It is the one
file there, beside what is measured, that another run of the same inputs would not write alike."""
KEPT = ("compute", "rollout")
"""What of a step's time goes into the step itself."""


@dataclasses.dataclass(frozen=True)
class FirstStart:
    """What a run is known by, however often it was stopped."""

    time: float
    """When it was first started, in seconds since 1970."""
    id: str
    """16 hexadecimal digits."""


def first_start(folder: str, identity: Mapping[str, Any], begun: float) -> FirstStart:
    """The first start of a run, which is this one where the folder knows of no other.

    Args:
      folder: of the run.
      identity: of the run, as its checkpoints have it; what the folder knows of another is dropped.
      begun: when this start was, in seconds since 1970.
    """
    path, of = os.path.join(folder, FILE), fingerprint_json(identity)

    def find() -> FirstStart:
        known = read_json(path)
        if known.get("identity") != of:
            known = {"identity": of, "first_start": begun, "id": secrets.token_hex(8)}
            write_atomic(path, json.dumps(known).encode())
        return FirstStart(known["first_start"], known["id"])

    return on_one(find)


class Goodput:
    """Adds up the time of steps that were kept."""

    def __init__(self, start: float, rows: Sequence[Mapping[str, float]]):
        """
        Args:
          start: the run's first, in seconds since 1970.
          rows: of `metrics.jsonl` up to the step that is gone on from. Steps behind it, which a
            kill lost, are done again and count once.
        """
        self.start = start
        self.kept, before = 0.0, 0.0
        for row in rows:
            per_step = sum(row.get(f"{MEASURED}{part}", 0.0) for part in KEPT)
            self.kept += (row["step"] - before) * per_step
            before = row["step"]

    def add(self, split: Mapping[str, float]) -> None:
        """Counts steps that were done, by the seconds that they took, see `Times.close`."""
        self.kept += sum(split[part] for part in KEPT)

    def passed(self) -> float:
        """Seconds since the first start, those between a stop and the next start among them."""
        return time.time() - self.start

    def share(self) -> float:
        """Of the seconds that passed, those that went into steps; 1 where none passed."""
        passed = self.passed()
        return self.kept / passed if passed > 0 else 1.0
