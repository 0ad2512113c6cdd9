"""How fast a labeler answers, in a file beside the tables, which hold no time."""

from __future__ import annotations

import json
import os

from mmpo_jax.core.files import read_json, write_atomic

FILE = "labeler_rate.json"


def add_rate(folder: str, questions: int, seconds: float) -> None:
    """Adds up what a labeler was asked in a round, over all runs of it.

    Args:
      folder: of the round.
      questions: that were answered now.
      seconds: that it took, loading and compiling included.
    """
    path = os.path.join(folder, FILE)
    before = read_json(path)
    total = {
        "questions": before.get("questions", 0) + questions,
        "seconds": before.get("seconds", 0.0) + seconds,
    }
    write_atomic(path, json.dumps(total).encode())


def read_rate(folder: str) -> float | None:
    """Questions per second in a round; None where nobody was asked."""
    total = read_json(os.path.join(folder, FILE))
    seconds = total.get("seconds", 0.0)
    return total["questions"] / seconds if seconds else None
