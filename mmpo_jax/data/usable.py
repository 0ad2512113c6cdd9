"""The records of a set that a checkpoint can be given, tokenised."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from etils import epath

from mmpo_jax.core import progress
from mmpo_jax.data.lengths import Lengths
from mmpo_jax.data.notes import by_count, shows_something, turns_of
from mmpo_jax.data.processor import Processor
from mmpo_jax.data.readers import left_out_rows
from mmpo_jax.data.records import Record
from mmpo_jax.data.skipped import Problem, SkippedRow, SkipReason, write_skipped
from mmpo_jax.data.sources import RecordSet
from mmpo_jax.data.tokenization import Tokenize, TokenizedRecord, tokenize, tokenize_records

log = logging.getLogger(__name__)


def usable_records(
    record_set: RecordSet,
    processor: Processor,
    lengths: Lengths | None,
    skipped_file: str,
    unfit: Callable[[TokenizedRecord], Problem | None] = lambda record: None,
    function: Tokenize = tokenize,
) -> tuple[RecordSet, list[TokenizedRecord]]:
    """Tokenizes a set of records; what cannot be used goes to a JSONL file with the reason.

    Args:
      record_set: the records, as they were loaded.
      processor: of the checkpoint.
      lengths: bucket sizes; the largest are the limits. None for no limits.
      skipped_file: not written where everything can be used.
      unfit: why a row is of no use for what it is read for (reason, detail); None where it is.
      function: tokenizes a record.

    Raises:
      DataError: more rows were skipped than the recipe allows, or none is left.
    """
    kept, skipped, refused = [], [], []
    told = sum(len(record.left_out) for record in record_set.records)
    records = [without_shown_media(record, processor) for record in record_set.records]
    record_set = dataclasses.replace(record_set, records=records)
    shown = sum(len(record.left_out) for record in records) - told
    if shown:
        log.warning("%s: responses left out of rows: image_position %d", record_set.name, shown)
    for record in record_set.records:
        problem = unsupported(record, processor)
        if problem is not None:
            refused.append(SkippedRow(record_set.name, record.row, record.id, *problem))
    ids = {row.id for row in refused}
    record_set = record_set.skip(
        [record for record in record_set.records if record.id not in ids], refused
    )
    numbers = {record.id: record.row for record in record_set.records}
    with progress.doing(f"tokenising {record_set.name}", len(record_set.records)) as activity:

        def counting(record: Record, *arguments: Any) -> TokenizedRecord:
            activity.advance()
            return function(record, *arguments)

        tokenized, too_long = tokenize_records(
            record_set.records, processor, lengths, record_set.name, counting
        )
    for row in tokenized:
        problem = unfit(row)
        if problem is None:
            kept.append(row)
        else:
            skipped.append(SkippedRow(record_set.name, numbers[row.id], row.id, *problem))
    ids = {row.id for row in kept}
    record_set = record_set.skip(
        [r for r in record_set.records if r.id in ids], [*too_long, *skipped]
    )
    partly = [*record_set.partly, *left_out_rows(record_set.records, record_set.name)]
    if record_set.skipped or partly:
        write_skipped(skipped_file, [*record_set.skipped, *partly])
    else:  # of an earlier run, before the data were mended
        epath.Path(skipped_file).unlink(missing_ok=True)
    record_set.check()
    if processor.images is not None:
        _warn_of_blind_rows(record_set)
    texts = TextNotes()
    for record in record_set.records:
        texts.add(record, processor)
    for line in texts.lines():
        log.warning("%s: %s", record_set.name, line)
    if lengths is not None:
        warn_of_cuts(record_set.name, kept, lengths)
    return record_set, kept


def _warn_of_blind_rows(record_set: RecordSet) -> None:
    """Says how many rows show a vision model nothing."""
    blind = sum(not shows_something(record) for record in record_set.records)
    if blind:
        total = len(record_set.records)
        log.warning("%s: %d of %d rows have no image or video", record_set.name, blind, total)


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


@dataclasses.dataclass
class TextNotes:
    """What tokenizer and chat template make of texts that their writers may not have meant."""

    typed: Counter[str] = dataclasses.field(default_factory=Counter)
    """Rows by control token that is typed in a text."""
    unread: Counter[str] = dataclasses.field(default_factory=Counter)
    """Rows by key of messages, or argument, that the chat template does not read."""

    def add(self, record: Record, processor: Processor) -> None:
        """Counts a row."""
        turns = turns_of(record)
        keys = {key for turn in turns for key in turn.keys} | record.template.keys()
        self.unread.update(sorted(key for key in keys if not processor.reads_key(key)))
        if processor.tokenizer.is_fast and not record.plain_text:
            said = [record.template, *(turn.keys for turn in turns)]
            texts = [json.dumps(value, ensure_ascii=False, default=str) for value in said if value]
            texts += [turn.text for turn in turns]
            self.typed.update({name for t in texts for name in processor.control.found_in(t)})

    def lines(self) -> Iterator[str]:
        """What the notes say, for a person."""
        if self.typed:
            yield (
                f"rows whose texts type control tokens: {by_count(self.typed)}; they are read as "
                "such, but for those of images (data.control_tokens: text makes them plain text)"
            )
        if self.unread:
            yield f"rows with what the chat template does not read: {by_count(self.unread)}"
