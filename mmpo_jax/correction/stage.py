"""What is wrong with the rejected responses of a data set, as a stage that can be resumed."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from mmpo_jax.core.files import fingerprint_items
from mmpo_jax.core.processes import check_same
from mmpo_jax.core.stages import Stage, run_told_stage
from mmpo_jax.correction.corrections import Case, Error, Found
from mmpo_jax.correction.correctors import Corrector
from mmpo_jax.data.records import MediaRef

CASES_PER_PART = 256

FOUND = pa.schema(
    [
        ("id", pa.string()),
        (
            "errors",
            pa.list_(pa.struct([(field.name, pa.string()) for field in dataclasses.fields(Error)])),
        ),
        ("reason", pa.string()),
        ("detail", pa.string()),
        ("failure", pa.string()),
        ("raw", pa.string()),
    ]
)
"""Columns of the stage, those of `Found` beside a pair's id."""


def find_errors(cases: Sequence[Case], corrector: Corrector, folder: str) -> list[Found]:
    """What is wrong with the rejected response of every pair, in order.

    It is found in parts, and a run that was killed goes on from those that are finished.

    Args:
      cases: the pairs.
      corrector: finds it.
      folder: of the stage `correct`.

    Raises:
      MmpoError: another process has other pairs.
      TooManyFailed: see `Corrector.find`; the part is not kept.
    """
    parts = max(1, -(-len(cases) // CASES_PER_PART))

    def make_part(part: int) -> pa.Table:
        # Equal to one pair: of a few left over, one that fails would be more than may.
        first, end = (len(cases) * at // parts for at in (part, part + 1))
        found = corrector.find(cases[first:end])
        rows = zip(cases[first:end], found, strict=True)
        return pa.Table.from_pylist(
            [{"id": case.id, **dataclasses.asdict(one)} for case, one in rows], schema=FOUND
        )

    pairs = fingerprint_items(_content(case, corrector.sees) for case in cases)
    check_same("the pairs to correct", lambda: pairs)
    stage = Stage(folder, "correct", {"pairs": pairs}, {"corrector": corrector.key}, parts)
    table = run_told_stage(stage, make_part).table
    corrector.release()
    return [_found(row) for row in table.drop_columns(["id"]).to_pylist()]


def _content(case: Case, sees: bool) -> list[object]:
    shown: list[MediaRef] = [*case.images, *case.videos] if sees else []
    digests = [medium.fingerprint() for medium in shown]
    return [case.id, case.question, case.chosen, case.rejected, case.solution, *digests]


def _found(row: dict[str, Any]) -> Found:
    errors = tuple(Error(**error) for error in row.pop("errors"))
    return Found(errors, **row)
