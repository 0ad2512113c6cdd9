"""`mmpo correct`: what is wrong with rejected responses, as questions and answers to learn from."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from mmpo_jax.commands.results import Results
from mmpo_jax.core.errors import DataError
from mmpo_jax.core.processes import on_one
from mmpo_jax.correction.codebook import load_codebook
from mmpo_jax.correction.corrections import Case, Found, case_of, corrected
from mmpo_jax.correction.correctors import Corrector, make_corrector
from mmpo_jax.correction.stage import find_errors
from mmpo_jax.data.formats import FORMATS
from mmpo_jax.data.formats.writing import Writer
from mmpo_jax.data.readers import left_out_rows
from mmpo_jax.data.records import Record
from mmpo_jax.data.skipped import SkippedRow, UnusableRow, check_skipped, write_skipped
from mmpo_jax.data.sources import RecordSet
from mmpo_jax.feedback.models import Models
from mmpo_jax.feedback.served import Servers
from mmpo_jax.parallel.mesh import make_mesh
from mmpo_jax.recipes.command_recipes import CorrectRecipe
from mmpo_jax.recipes.correction import Layout

log = logging.getLogger(__name__)


def main(recipe: CorrectRecipe) -> None:
    print(f"corrected: {run_correction(recipe)}")


def run_correction(recipe: CorrectRecipe) -> str:
    """Finds the errors of every rejected response, and writes questions about them behind the
    chosen one.

    Returns:
      The file, a record a line (docs/correct.md): what `mmpo train` reads for nSFT. Rows that are
      left out are in `rejected_rows.jsonl` beside it, with reasons, and with the last reply of a
      model that could not be read.
    """
    codebook = load_codebook(recipe.codebook)
    results = Results.at(recipe.output, "corrected", recipe.data)
    with Servers(results.parts) as servers:
        models = Models(
            make_mesh(**recipe.devices.model_dump()),
            recipe.attention,
            servers,
            base="",  # every section names its model
            template="auto",
            seed=recipe.seed,
        )
        corrector = make_corrector(recipe, codebook, models)
        corrector.check()
        record_set = recipe.data.load(supervised=True)
        pairs, unusable = _pairs(record_set, recipe.layout, corrector)
        left_out = [*unusable, *left_out_rows(record_set.records, record_set.name)]
        _write_left_out(results.skipped, left_out)
        _tell_left_out(record_set.name, unusable, results.skipped)
        total = len(pairs) + len(unusable)
        check_skipped(unusable, total, record_set.max_skipped)
        found = find_errors([case for _, case in pairs], corrector, results.parts)
    rows, without = [], []
    for (record, case), one in zip(pairs, found, strict=True):
        if one.errors:
            answers = corrector.answers(case)
            rows.append(corrected(record, one.errors, answers, recipe.seed, recipe.layout))
        else:
            without.append(_left_out(record_set.name, record, one))
    _write_left_out(results.skipped, [*left_out, *without])
    _tell(record_set.name, len(pairs), found)
    if not rows:
        raise DataError(
            f"{record_set.name}: no response could be corrected; {results.skipped} says why"
        )
    writer = Writer(os.path.dirname(results.rows), results.images)
    return results.write(FORMATS["record"].write(row, writer) for row in rows)


def _pairs(
    record_set: RecordSet, layout: Layout, corrector: Corrector
) -> tuple[list[tuple[Record, Case]], list[SkippedRow]]:
    """The records that are pairs, as correctors are asked about them, and the rows that are not."""
    pairs, skipped = [], [*record_set.skipped]
    for record in record_set.records:
        try:
            case, problem = case_of(record, layout), corrector.unfit(record)
            if problem is not None:
                raise UnusableRow(*problem)
            pairs.append((record, case))
        except UnusableRow as problem:
            skipped.append(
                SkippedRow(record_set.name, record.row, record.id, problem.reason, problem.detail)
            )
    return pairs, skipped


def _left_out(name: str, record: Record, found: Found) -> SkippedRow:
    """The row of a response without corrections."""
    assert found.reason is not None
    raw = "" if found.raw is None else f"; the last reply: {found.raw}"
    return SkippedRow(name, record.row, record.id, found.reason, found.detail + raw)


def _write_left_out(path: str, skipped: Sequence[SkippedRow]) -> None:
    def write() -> None:
        if skipped:
            write_skipped(path, skipped)
        else:  # of an earlier run
            epath.Path(path).unlink(missing_ok=True)

    on_one(write)


def _tell_left_out(name: str, rows: Sequence[SkippedRow], path: str) -> None:
    if rows:
        reasons = _told(Counter(row.reason for row in rows))
        log.warning("%s: %d rows are left out: %s; %s says which", name, len(rows), reasons, path)


def _tell(name: str, pairs: int, found: Sequence[Found]) -> None:
    """Says what was found, and why nothing was."""
    kinds = Counter(error.kind for one in found for error in one.errors)
    corrections = sum(bool(one.errors) for one in found)
    log.info("%s: %d of %d responses have corrections: %s", name, corrections, pairs, _told(kinds))
    reasons = Counter(one.reason for one in found if one.reason is not None)
    if reasons:
        log.info("%s: %d have none: %s", name, reasons.total(), _told(reasons))
    failures = Counter(one.failure for one in found if one.failure is not None)
    if failures:
        log.warning("%s: replies that could not be read: %s", name, _told(failures))


def _told(counts: Mapping[Any, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in Counter(counts).most_common()) or "none"
