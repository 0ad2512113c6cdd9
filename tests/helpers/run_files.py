"""Files of a run as they have to be, however often it was stopped."""

import json
import math
from pathlib import Path

from mmpo_jax.training.metrics import read_metrics, reproducible


def reproducible_rows(path):
    """The lines of a `metrics.jsonl` without what is measured; null where a number is not finite,
    so that lines compare equal."""
    rows = [reproducible(row) for row in read_metrics(path)]
    return [{k: v if math.isfinite(v) else None for k, v in row.items()} for row in rows]


def contents(path):
    """The bytes of a file, without what clocks and devices say in a `metrics.jsonl`."""
    path = Path(path)
    if path.name != "metrics.jsonl":
        return path.read_bytes()
    return "".join(json.dumps(row) + "\n" for row in reproducible_rows(path)).encode()
