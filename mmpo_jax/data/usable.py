"""The records of a set that a checkpoint can be given, tokenised."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence

from mmpo_jax.core import progress
from mmpo_jax.data.agreement import check_same_records
from mmpo_jax.data.lengths import Lengths
from mmpo_jax.data.notes import shows_something
from mmpo_jax.data.processor import Processor
from mmpo_jax.data.readers import left_out_rows
from mmpo_jax.data.records import Record
from mmpo_jax.data.skipped import Problem, SkippedRow, SkipReason, UnusableRow
from mmpo_jax.data.sources import RecordSet
from mmpo_jax.data.tally import Tally, settle
from mmpo_jax.data.tokenization import UNLIMITED, Tokenize, TokenizedRecord, tokenize

Unfit = Callable[[TokenizedRecord], Problem | None]
"""Says why a row is of no use for what it is read for (reason, detail); None where it is."""


Tokenized = Callable[[Record], TokenizedRecord]
"""Tokenizes a record; raises `UnusableRow`."""


def any_row(record: TokenizedRecord) -> Problem | None:
    """None: the `Unfit` of what takes every row."""
    return None


def usable_records(
    record_set: RecordSet,
    processor: Processor,
    lengths: Lengths | None,
    skipped_file: str,
    unfit: Unfit = any_row,
    function: Tokenize = tokenize,
    *,
    alone: bool = False,
) -> tuple[RecordSet, list[TokenizedRecord]]:
    """Tokenizes a set of records; what cannot be used goes to a JSONL file with the reason.

    Args:
      record_set: the records, as they were loaded.
      processor: of the checkpoint.
      lengths: bucket sizes; the largest are the limits. None for no limits.
      skipped_file: not written where everything can be used.
      unfit: why a row is of no use for what it is read for (reason, detail); None where it is.
      function: tokenizes a record.
      alone: whether of several responses those that cannot be tokenized are left out alone.

    Raises:
      DataError: more rows were skipped than the recipe allows, or none is left.
      MmpoError: another process has other records.
    """
    name = record_set.name
    tally = Tally(
        unreadable=[*record_set.skipped], joined=record_set.joined, partly=[*record_set.partly]
    )
    with progress.doing(f"tokenising {name}", len(record_set.records)) as activity:
        rows = activity.each(record_set.records)
        used = list(
            tokenize_usable(
                rows, name, processor, limits_of(lengths), tally, unfit, function, alone=alone
            )
        )
    limit = None if lengths is None else lengths.response[-1]
    settle(tally, name, skipped_file, record_set.max_skipped, processor.images is not None, limit)
    records, tokenized = [record for record, _ in used], [row for _, row in used]
    check_same_records(name, tokenized)
    return dataclasses.replace(record_set, records=records, skipped=tally.skipped), tokenized


def limits_of(lengths: Lengths | None) -> tuple[int, int]:
    """Most tokens of a prompt and of a response."""
    if lengths is None:
        return UNLIMITED, UNLIMITED
    return lengths.prompt[-1], lengths.response[-1]


def tokenize_usable(
    records: Iterable[Record],
    name: str,
    processor: Processor,
    limits: tuple[int, int],
    tally: Tally,
    unfit: Unfit,
    function: Tokenize,
    *,
    alone: bool = False,
) -> Iterator[tuple[Record, TokenizedRecord]]:
    """The records that can be used, and their tokens, in order.

    Args:
      records: whose images open.
      name: of the set.
      processor: of the checkpoint.
      limits: most tokens of a prompt and of a response.
      tally: counts; it grows.
      unfit, function, alone: see `usable_records`.
    """

    def tokenized(record: Record) -> TokenizedRecord:
        return function(record, processor, *limits)

    for given in records:
        record = without_shown_media(given, processor)
        tally.shown += len(record.left_out) - len(given.left_out)
        problem = unsupported(record, processor)
        if problem is not None:
            tally.unsupported.append(SkippedRow(name, record.row, record.id, *problem))
            continue
        try:
            record, row = taken(record, tokenized) if alone else (record, tokenized(record))
        except UnusableRow as error:
            skipped = SkippedRow(name, record.row, record.id, error.reason, error.detail)
            tally.too_long.append(skipped)
            continue
        problem = unfit(row)
        if problem is not None:
            tally.unfit.append(SkippedRow(name, record.row, row.id, *problem))
            continue
        tally.usable += 1
        tally.partly += left_out_rows([record], name)
        tally.blind += not shows_something(record)
        tally.cut += count_cut(row)
        tally.texts.add(record, processor)
        yield record, row


def count_cut(record: TokenizedRecord) -> int:
    """How many responses of a record lost their tail."""
    return sum(response.truncated > 0 for response in record.responses)


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


def rejections(record: Record, function: Tokenized) -> list[Problem | None]:
    """Of every response of a record, why a function does not tokenize the record with it; None of
    those with which together it does."""
    problems: list[Problem | None] = [None] * len(record.responses)
    try:
        function(record)
    except UnusableRow as error:
        whole: Problem = error.reason, error.detail
    else:
        return problems
    for place, response in enumerate(record.responses):
        try:
            function(dataclasses.replace(record, responses=(response,)))
        except UnusableRow as error:
            problems[place] = error.reason, error.detail
    if any(problems) and not all(problems):
        others = with_responses(record, [problem is None for problem in problems])
        rest = iter(rejections(others, function))
        return [problem or next(rest) for problem in problems]
    return problems if any(problems) else [whole] * len(problems)


def read_or_not(
    record: Record, function: Tokenized
) -> tuple[TokenizedRecord | None, list[Problem | None]]:
    """(tokens of the responses that a function takes, None where it takes none; of every response
    why it does not)."""
    try:
        return function(record), [None] * len(record.responses)
    except UnusableRow:
        problems = rejections(record, function)
    if all(problems):
        return None, problems
    return function(with_responses(record, [problem is None for problem in problems])), problems


def with_responses(record: Record, kept: Sequence[bool]) -> Record:
    """A record with some of its responses."""
    responses = itertools.compress(record.responses, kept)
    return dataclasses.replace(record, responses=tuple(responses))


def taken(record: Record, function: Tokenized) -> tuple[Record, TokenizedRecord]:
    """(a record without the responses that a function does not take, its tokens).

    Raises:
      UnusableRow: it takes none.
    """
    try:
        return record, function(record)
    except UnusableRow:
        kept = _without(record, rejections(record, function))
    return kept, function(kept)


def _without(record: Record, problems: Sequence[Problem | None]) -> Record:
    """A record without the responses that have a problem, unless all have."""
    if all(problems):
        return record
    gone = {place for place, *_ in record.left_out}
    total = len(record.responses) + len(gone)
    places = [place for place in range(total) if place not in gone]
    told = [(place, *one) for place, one in zip(places, problems, strict=True) if one is not None]
    kept = with_responses(record, [problem is None for problem in problems])
    return dataclasses.replace(kept, left_out=tuple(sorted((*record.left_out, *told))))


def _shows_images(record: Record) -> bool:
    return bool(record.images) or any(response.images for response in record.responses)
