"""Files of `mmpo reward`: rewards of rows, which training takes for the scores of responses."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
from collections.abc import Mapping
from typing import Any

from mmpo_jax.core.errors import DataError
from mmpo_jax.core.files import is_local, read_bytes
from mmpo_jax.core.known_files import state_of
from mmpo_jax.data.records import SCORE, Record

Rewards = Mapping[str, tuple[float | None, ...]]
"""Id of a row -> the reward of each of its responses, None for one that has none."""


def rewarded(record: Record, path: str) -> Record:
    """A record whose responses' scores are the rewards that a file gives its row. A row that is not
    there gives none, and so does a response without a reward.

    Raises:
      DataError: the file cannot be read, or says it of another number of responses.
    """
    given = read_rewards(path).get(record.id) if record.responses else None
    if given is None:
        responses = tuple(dataclasses.replace(one, scores={}) for one in record.responses)
        return dataclasses.replace(record, responses=responses)
    gone = {place for place, *_ in record.left_out}
    count = len(record.responses) + len(gone)
    if len(given) != count:
        raise DataError(
            f"{path}: row {record.id!r} has {len(given)} rewards, and the data have {count} "
            "responses; run `mmpo reward` on these data"
        )
    kept = [reward for place, reward in enumerate(given) if place not in gone]
    responses = tuple(
        dataclasses.replace(one, scores={} if reward is None else {**one.scores, SCORE: reward})
        for one, reward in zip(record.responses, kept, strict=True)
    )
    return dataclasses.replace(record, responses=responses)


def read_rewards(path: str) -> Rewards:
    """The rewards of a file, which is read once as long as it stays as it is; one in a bucket is
    read once by a process, as asking how it is takes as long.

    Raises:
      DataError: it cannot be read, a row comes twice, or a reward is no finite number.
    """
    state = state_of(path) if is_local(path) else None
    return _read(path, None if state is None else tuple(state))


@functools.lru_cache(4)
def _read(path: str, state: tuple[int, ...] | None) -> Rewards:
    found: dict[str, tuple[float | None, ...]] = {}
    for number, line in enumerate(read_bytes(path).splitlines(), start=1):
        try:
            row = json.loads(line)
            name, rewards = row["id"], row["rewards"]
            given = tuple(_reward(one) for one in rewards)
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{os.fspath(path)}: line {number} is no row of `mmpo reward`: {error}"
            ) from error
        if name in found:
            raise DataError(f"{os.fspath(path)}: line {number}: the id {name!r} is there again")
        found[name] = given
    return found


def _reward(value: Any) -> float | None:
    """
    Raises:
      ValueError: it is neither a finite number nor null.
    """
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"a reward is a finite number or null, not {value!r}")
    return float(value)
