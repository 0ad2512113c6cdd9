"""How long stages took, in a file beside their results, which hold no time."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

from etils import epath

from mmpo_jax.core.files import read_json, write_json
from mmpo_jax.core.processes import is_first
from mmpo_jax.core.progress import duration

log = logging.getLogger(__name__)

FILE = "timings.json"
"""In a folder of stages: name -> what `add_time` adds up."""
WORTH_A_LINE = 1.0
"""Seconds from which on the log says how fast a stage was."""
_lock = threading.Lock()


def add_time(folder: epath.PathLike, name: str, key: str, spent: Mapping[str, float]) -> None:
    """Adds up what a stage took, over all runs of it; what is known of another key is dropped.

    A file that cannot be written is told in the log: it is not worth losing what was made.

    Args:
      folder: of the stage.
      name: of the stage.
      key: of all that its result depends on.
      spent: `seconds` that a part of it took now, and how many `rows`, `tokens` or the like that
        part has.
    """
    path = os.path.join(os.fspath(folder), FILE)
    with _lock:
        stages = read_json(path)
        before = stages.get(name, {})
        if before.get("key") != key:
            before = {}
        sums = {unit: before.get(unit, 0) + amount for unit, amount in spent.items()}
        stages[name] = {**before, "key": key, **sums}
        try:
            write_json(path, stages)
        except OSError as error:
            log.warning("%s: cannot be written: %s", path, error.strerror or error)


def rates(took: Mapping[str, float]) -> dict[str, float]:
    """How much a second, by unit; nothing where no time passed.

    Args:
      took: `seconds`, and amounts by unit.
    """
    seconds = took.get("seconds", 0.0)
    units = [unit for unit in ("rows", "tokens") if unit in took and seconds]
    return {unit: took[unit] / seconds for unit in units}


def log_rates(name: str, took: Mapping[str, float]) -> None:
    """Says in the log how fast a stage was, loading and compiling included, unless it was over in
    no time."""
    if took.get("seconds", 0.0) >= WORTH_A_LINE:
        told = ", ".join(f"{rate:.4g} {unit}/s" for unit, rate in rates(took).items())
        log.info("%s: %d rows in %s, %s", name, took["rows"], duration(took["seconds"]), told)


@contextlib.contextmanager
def timed(folder: str, name: str, key: str, amounts: Mapping[str, float]) -> Iterator[None]:
    """Adds up what is done within as a stage that is no table, also where it is stopped; of several
    processes the first one's time, see `add_time`.

    The amounts count when all is done.
    """
    begun = time.perf_counter()
    done: Mapping[str, float] = {}
    try:
        yield
        done = amounts
    finally:
        if is_first():  # the others may not have come this far
            add_time(folder, name, key, {"seconds": time.perf_counter() - begun, **done})


def read_timings(folder: epath.PathLike) -> dict[str, dict[str, Any]]:
    """What the stages of a folder took, by name: `seconds`, `rows`, ...; nothing where there is no
    such file."""
    return read_json(os.path.join(os.fspath(folder), FILE))
