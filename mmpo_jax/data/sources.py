"""From a recipe's `data` section to records."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from typing import Any

from etils import epath

from mmpo_jax.core import progress
from mmpo_jax.core.errors import DataError
from mmpo_jax.data.joining import join_pairs
from mmpo_jax.data.notes import Notes, TextNotes, shows_something
from mmpo_jax.data.processor import Processor
from mmpo_jax.data.readers import (
    Problem,
    SkippedRow,
    check_images,
    check_skipped,
    left_out_rows,
    read_records,
    write_skipped,
)
from mmpo_jax.data.records import SCORE, Record, Response
from mmpo_jax.data.rows import MessagesAs, SkipReason
from mmpo_jax.data.settings import FileData, LearnedFile, Lengths
from mmpo_jax.data.tokenization import Tokenize, TokenizedRecord, tokenize, tokenize_records

log = logging.getLogger(__name__)

SKIPPED = "rejected_rows.jsonl"
"""Rows of the data that were left out, with reasons; where a run has a folder, in it."""


@dataclasses.dataclass(frozen=True)
class Source:
    """Usable records and the rows left out."""

    name: str
    """For messages: the file, or the picture world's split."""
    records: list[Record]
    skipped: list[SkippedRow]
    max_skipped: float
    joined: int = 0
    """Rows that went into others' rankings."""
    partly: tuple[SkippedRow, ...] = ()
    """Responses that alone were left out of rows that went into rankings."""

    def skip(self, kept: list[Record], skipped: list[SkippedRow]) -> Source:
        """The source with more rows left out."""
        return dataclasses.replace(self, records=kept, skipped=[*self.skipped, *skipped])

    def check(self) -> None:
        """
        Raises:
          DataError: more rows were skipped than the recipe allows, or none is left.
        """
        total = len(self.records) + len(self.skipped) + self.joined
        for row in self.skipped[:10]:
            log.warning("%s: skipped %s", row.file, row)
        check_skipped(self.skipped, total, self.max_skipped)
        if not self.records:
            raise DataError(f"{self.name}: no row that can be used")


def load_file(data: FileData, supervised: bool, messages_as: MessagesAs) -> Source:
    """The records of a file that a recipe names, unusable rows set apart.

    Args:
      data: where from.
      supervised: whether responses to learn from are wanted, or prompts only.
      messages_as: what rows of `messages` supervise, see `readers.iter_records`.

    Raises:
      DataError: the file cannot be read.
    """
    notes = Notes()
    records, skipped = read_records(
        data.path, data.image_root, messages_as, data.format, notes, prompts_only=not supervised
    )
    for line in notes.lines():
        log.info("%s: %s", data.path, line)
    for line in notes.warnings():
        log.warning("%s: %s", data.path, line)
    if data.control_tokens == "text":
        records = [dataclasses.replace(record, plain_text=True) for record in records]
    records, broken = check_images(records, data.path)
    skipped = [*skipped, *broken]
    if not supervised:
        skipped += [_without_prompt(data.path, record) for record in records if not record.prompt]
        records = [dataclasses.replace(r, responses=()) for r in records if r.prompt]
    joined, partly = 0, list[SkippedRow]()
    if supervised and isinstance(data, LearnedFile) and data.join_pairs:
        done = join_pairs(records)
        log.info("%s: %s", data.path, done)
        alone = set(map(id, done.records))
        partly = left_out_rows((r for r in records if id(r) not in alone), data.path)
        records, joined = done.records, done.merged
    return Source(data.path, records, skipped, data.max_skipped, joined, tuple(partly))


def scored_by(source: Source, name: str) -> Source:
    """With a score of every response as the one that is called `SCORE`.

    Args:
      source: the records.
      name: of the score; a response that has none of it gets no scores.
    """

    def scored(response: Response) -> Response:
        score = response.scores.get(name)
        scores = {} if score is None else {**response.scores, SCORE: score}
        return dataclasses.replace(response, scores=scores)

    records = [
        dataclasses.replace(record, responses=tuple(map(scored, record.responses)))
        for record in source.records
    ]
    return dataclasses.replace(source, records=records)


def usable_records(
    source: Source,
    processor: Processor,
    lengths: Lengths | None,
    skipped_file: str,
    unfit: Callable[[TokenizedRecord], Problem | None] = lambda record: None,
    function: Tokenize = tokenize,
) -> tuple[Source, list[TokenizedRecord]]:
    """Tokenizes a source; what cannot be used goes to a JSONL file with the reason.

    Args:
      source: the records.
      processor: of the checkpoint.
      lengths: bucket sizes; the largest are the limits. None for no limits.
      skipped_file: not written where everything can be used.
      unfit: why a row is of no use for what it is read for (reason, detail); None where it is.
      function: tokenizes a record.

    Raises:
      DataError: more rows were skipped than the recipe allows, or none is left.
    """
    kept, skipped, refused = [], [], []
    told = sum(len(record.left_out) for record in source.records)
    records = [without_shown_media(record, processor) for record in source.records]
    source = dataclasses.replace(source, records=records)
    shown = sum(len(record.left_out) for record in records) - told
    if shown:
        log.warning("%s: responses left out of rows: image_position %d", source.name, shown)
    for record in source.records:
        problem = unsupported(record, processor)
        if problem is not None:
            refused.append(SkippedRow(source.name, record.row, record.id, *problem))
    ids = {row.id for row in refused}
    source = source.skip([record for record in source.records if record.id not in ids], refused)
    numbers = {record.id: record.row for record in source.records}
    with progress.doing(f"tokenising {source.name}", len(source.records)) as activity:

        def counting(record: Record, *arguments: Any) -> TokenizedRecord:
            activity.advance()
            return function(record, *arguments)

        tokenized, too_long = tokenize_records(
            source.records, processor, lengths, source.name, counting
        )
    for row in tokenized:
        problem = unfit(row)
        if problem is None:
            kept.append(row)
        else:
            skipped.append(SkippedRow(source.name, numbers[row.id], row.id, *problem))
    ids = {row.id for row in kept}
    source = source.skip([r for r in source.records if r.id in ids], [*too_long, *skipped])
    partly = [*source.partly, *left_out_rows(source.records, source.name)]
    if source.skipped or partly:
        write_skipped(skipped_file, [*source.skipped, *partly])
    else:  # of an earlier run, before the data were mended
        epath.Path(skipped_file).unlink(missing_ok=True)
    source.check()
    if processor.images is not None:
        _warn_of_blind_rows(source)
    texts = TextNotes()
    for record in source.records:
        texts.add(record, processor)
    for line in texts.lines():
        log.warning("%s: %s", source.name, line)
    if lengths is not None:
        warn_of_cuts(source.name, kept, lengths)
    return source, kept


def _warn_of_blind_rows(source: Source) -> None:
    """Says how many rows show a vision model nothing."""
    blind = sum(not shows_something(record) for record in source.records)
    if blind:
        total = len(source.records)
        log.warning("%s: %d of %d rows have no image or video", source.name, blind, total)


def warn_of_cuts(name: str, records: Sequence[TokenizedRecord], lengths: Lengths) -> None:
    """Says how many responses lost their tail to the largest bucket."""
    cut = sum(response.truncated > 0 for row in records for response in row.responses)
    if cut:
        log.warning("%s: %d responses were cut to %d tokens", name, cut, lengths.response[-1])


def unsupported(record: Record, processor: Processor) -> Problem | None:
    """What a record shows that the model does not take; None where it takes all."""
    if processor.images is None and _shows_images(record):
        return "unsupported_image", "this model takes no images"
    if record.videos and processor.videos is None:
        return "unsupported_video", "this model takes no videos"
    return None


def without_shown_media(record: Record, processor: Processor) -> Record:
    """A record without the responses whose answers hold a token that stands for media; with all of
    them where too few others would be left, as then the whole row cannot be used."""
    gone = {place for place, *_ in record.left_out}
    total = len(record.responses) + len(gone)
    places = [place for place in range(total) if place not in gone]
    shown = [processor.shows_media(response) for response in record.responses]
    left = shown.count(False)
    if not any(shown) or left < (2 if record.ranked else 1):
        return record
    detail = "an answer holds the image placeholder"
    told: list[tuple[int, SkipReason, str]] = [
        (place, "image_position", detail)
        for place, shows in zip(places, shown, strict=True)
        if shows
    ]
    kept = [one for one, shows in zip(record.responses, shown, strict=True) if not shows]
    left_out = tuple(sorted((*record.left_out, *told)))
    return dataclasses.replace(record, responses=tuple(kept), left_out=left_out)


def _shows_images(record: Record) -> bool:
    return bool(record.images) or any(response.images for response in record.responses)


def _without_prompt(path: str, record: Record) -> SkippedRow:
    detail = "the row's responses do not share a prompt that could be answered"
    return SkippedRow(path, record.row, record.id, "no_prompt", detail)
