"""`mmpo data convert`: the rows of one format as rows of another."""

from __future__ import annotations

import argparse
import dataclasses
import os
import shutil
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping

from etils import epath

from mmpo_jax.core.errors import DataError, MmpoError
from mmpo_jax.core.files import check_reachable
from mmpo_jax.core.output import claimed
from mmpo_jax.core.progress import counted
from mmpo_jax.data.files import write_rows
from mmpo_jax.data.formats import choose_format, format_called
from mmpo_jax.data.formats.format import Format
from mmpo_jax.data.formats.writing import STRIP, CannotHold, Embed, Writer, fields_of, without
from mmpo_jax.data.joining import Joined, join_pairs
from mmpo_jax.data.notes import Notes
from mmpo_jax.data.pair_questions import pairs_as_questions, unfit_for_questions
from mmpo_jax.data.readers import TFDS, iter_records, left_out_rows
from mmpo_jax.data.records import Record
from mmpo_jax.data.rows import Row
from mmpo_jax.data.skipped import SKIPPED_FILE, SkippedRow, check_skipped, write_skipped

_EMBED: Mapping[str, Embed] = {
    ".parquet": "bytes",
    ".array_record": "base64",
    ".arrayrecord": "base64",
}
"""How the rows of a kind of file hold images; those of others name them."""


@dataclasses.dataclass(frozen=True)
class Converted:
    """What became of the rows."""

    written: int
    skipped: list[SkippedRow]
    skipped_file: str
    """File of those, with reasons, and of responses that alone were left out; not written where
    there are none."""
    joined: Joined | None
    """What joining pairs did, where it was asked for."""
    told: tuple[str, ...] = ()
    """What reading and joining brought up, for a person, as `data check` says it."""


def main(options: argparse.Namespace) -> None:
    with claimed(options.target, is_file=True):
        done = convert_data(
            options.source,
            options.target,
            format=options.format,
            read_as=options.read_as,
            image_root=options.image_root,
            drop=options.drop,
            max_skipped=options.max_skipped,
            join=options.join_pairs,
            ask_which=options.ask_which,
        )
    print(f"{options.target}: {done.written} rows", *done.told, sep="\n")
    if done.skipped:
        print(f"{done.skipped_file}: {len(done.skipped)} rows that cannot be used")


def convert_data(
    source: str,
    target: str,
    *,
    format: str = "record",
    read_as: str = "auto",
    image_root: str | None = None,
    drop: Collection[str] = (),
    max_skipped: float = 0.1,
    join: bool = False,
    ask_which: bool = False,
) -> Converted:
    """Writes the usable rows of `source` to the file `target`.

    Paths of images are written relative to `image_root`, or to the target's folder; what does not
    lie there is copied to a folder beside the target. Parquet and ArrayRecord hold the images.
    Images are not decoded.

    Args:
      source: see `mmpo_jax.data.readers.iter_records`.
      target: its ending says what kind of file.
      format: of the target, one of `FORMATS`.
      read_as: the same of the source, or "auto".
      image_root: of both; of TFDS names its data folder.
      drop: fields, of `STRIP`, that are left out.
      max_skipped: share of unusable rows above which nothing is written.
      join: the pairs of one prompt into a ranking, see `join_pairs`.
      ask_which: write every two responses as a question which is better, in both orders, see
        `pairs_as_questions`.

    Raises:
      MmpoError: an unknown field, or the target is the source.
      CannotHold: the format has no place for a field of a row.
      DataError: the source cannot be read, too many rows cannot be used, or an unknown format.
    """
    unknown = sorted(set(drop) - STRIP.keys())
    if unknown:
        raise MmpoError(f"--drop {', '.join(unknown)}: no such field; known: {', '.join(STRIP)}")
    if os.path.realpath(source) == os.path.realpath(target):
        raise MmpoError(f"{target} is the source; give another file")
    convention = format_called(format)
    check_reachable(target)
    stem, ending = os.path.splitext(target)
    root = os.path.dirname(target) or "."
    if image_root is not None and not source.startswith(TFDS):
        root = image_root
    copies = os.path.join(root, f"{os.path.basename(stem)}.images")
    had_copies = os.path.isdir(copies)
    writer = Writer(root, copies, _EMBED.get(ending.lower(), "no"))
    skipped: list[SkippedRow] = []
    partly: list[SkippedRow] = []
    notes = Notes()

    def records() -> Iterator[Record]:
        read = iter_records(source, image_root, "dialogue", read_as, notes)
        for item in counted(read, "converting"):
            if isinstance(item, SkippedRow):
                skipped.append(item)
            else:
                partly.extend(left_out_rows([item], source))
                yield item

    def rows(records: Iterable[Record]) -> Iterator[Row]:
        for record in records:
            try:
                yield _row(without(_by_own_id(record), drop), convention, writer)
            except DataError as error:
                broken = SkippedRow(source, record.row, record.id, "image_broken", str(error))
                skipped.append(broken)

    joined = join_pairs(records()) if join else None
    kept = list(records() if joined is None else joined.records)
    read = len(kept) + len(skipped)
    if ask_which:
        unfit = [(record, unfit_for_questions(record)) for record in kept]
        kept = [record for record, problem in unfit if problem is None]
        skipped += [
            SkippedRow(source, record.row, record.id, *problem)
            for record, problem in unfit
            if problem is not None
        ]
    made = list(rows(pairs_as_questions(kept) if ask_which else kept))
    skipped_file = f"{stem}.{SKIPPED_FILE}"
    if skipped or partly:
        write_skipped(skipped_file, [*skipped, *partly])
    else:
        epath.Path(skipped_file).unlink(missing_ok=True)
    merged = 0 if joined is None else joined.absorbed
    try:
        check_skipped(skipped, read + merged, max_skipped)
    except DataError as error:
        if not had_copies:
            shutil.rmtree(copies, ignore_errors=True)
        raise DataError(f"{error}\n{skipped_file} has all of them; no row is written") from error
    write_rows(target, made)
    # Ids are written as the rows have them, and so are columns that mean nothing.
    notes = dataclasses.replace(notes, repeated_ids=0, ignored=Counter())
    told = (*notes.lines(), *notes.warnings(), *([] if joined is None else [str(joined)]))
    return Converted(len(made), skipped, skipped_file, joined, told)


def _by_own_id(record: Record) -> Record:
    """The record with the id that the row has, also where an earlier row has it too."""
    return record if record.own_id is None else dataclasses.replace(record, id=record.own_id)


def _row(record: Record, format: Format, writer: Writer) -> Row:
    """One record in a format.

    Raises:
      CannotHold: naming the row, the field and what leaves it out.
    """
    try:
        lacking = sorted(fields_of(record) - format.holds)
        if lacking:
            raise CannotHold(*lacking)
        row = format.write(record, writer)
        if record.extra and choose_format(row) is not format:
            plain = format.write(dataclasses.replace(record, extra={}), writer)
            if choose_format(plain) is format:
                detail = f"with {', '.join(record.extra)} it would look like another format"
                raise CannotHold("extra", detail=detail)
    except CannotHold as error:
        known = STRIP.keys() >= set(error.fields)
        hint = f"; --drop {','.join(error.fields)} leaves it out" if known else ""
        where = f"row {record.row} (id {record.id!r})"
        raise MmpoError(f"{where} as {format.name}: {error}{hint}") from error
    return row
