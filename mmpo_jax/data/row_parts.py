"""A part of the rows of a file: read, checked and tokenised, in whichever process.

What is made is a file of `row_tables`, with what became of the rows that it covers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from mmpo_jax.core.errors import DataError
from mmpo_jax.core.files import write_atomic
from mmpo_jax.core.known_files import flush, kept_fingerprint
from mmpo_jax.data.formats.media import MediaFolder
from mmpo_jax.data.image_states import seen_by
from mmpo_jax.data.media_check import media_problem, with_known_images
from mmpo_jax.data.parsing import NamedRow, parse_row
from mmpo_jax.data.processor import Processor
from mmpo_jax.data.readers import media_root
from mmpo_jax.data.records import SOLUTIONS, Record
from mmpo_jax.data.row_tables import encode_rows, open_table, table_bytes
from mmpo_jax.data.rows import MessagesAs
from mmpo_jax.data.skipped import Problem, SkippedRow
from mmpo_jax.data.sources import FileData, scored_record, without_prompt
from mmpo_jax.data.tally import Tally
from mmpo_jax.data.tokenization import TokenizedRecord
from mmpo_jax.data.usable import tokenize_usable

_NOTES = b"mmpo_jax"
"""Key of a part's metadata."""

Raw = NamedRow | Record
"""A row of a file, or a record out of several."""


class RowUse(Protocol):
    """What rows are read for. It is pickled."""

    @property
    def supervised(self) -> bool:
        """Whether responses are read, or prompts only."""

    @property
    def messages_as(self) -> MessagesAs:
        """What rows of `messages` supervise, see `parsing.parse_rows`."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of what `tell` gives."""

    @property
    def modules(self) -> tuple[str, ...]:
        """Modules that have to be imported first, as they register what the methods need."""

    def key(self) -> Any:
        """All that the methods depend on, as JSON."""

    def tokenize(
        self, record: Record, processor: Processor, max_prompt: int, max_response: int
    ) -> TokenizedRecord:
        """Tokens of a record, see `tokenization.tokenize`."""

    def unfit(self, record: TokenizedRecord) -> Problem | None:
        """Why a row is of no use; None where it is."""

    def select(self, record: TokenizedRecord) -> TokenizedRecord:
        """The record with the responses that are read."""

    def tell(self, record: TokenizedRecord) -> Mapping[str, str]:
        """Short texts to know a row by without reading it, by column."""


@dataclasses.dataclass(frozen=True)
class Job:
    """What the parts of a stage have in common."""

    data: FileData
    use: RowUse
    folder: str
    """Folder of the parts."""
    checkpoint: tuple[str, Any, str]
    """Arguments of the processor."""
    limits: tuple[int, int]
    modules: tuple[str, ...]
    """Modules that register formats of rows, and what the use needs."""

    def part(self, number: int) -> str:
        """File of a part."""
        return os.path.join(self.folder, f"{number:05d}.arrow")


_processors: dict[tuple[str, str], Processor] = {}
"""Processors of this process, by folder and template."""


@contextlib.contextmanager
def given(job: Job, processor: Processor) -> Iterator[None]:
    """Parts that are made in this process within have a processor that is there."""
    folder, _, template = job.checkpoint
    _processors[folder, template] = processor
    try:
        yield
    finally:
        del _processors[folder, template]


def make_part(job: Job, number: int, rows: Sequence[Raw], before: Tally) -> dict[str, Any]:
    """Makes a part, unless it is there.

    Args:
      job: what it has in common with others.
      number: from 0.
      rows: of the file, or records out of them.
      before: what became of rows that are in no part.

    Returns:
      How many rows it was made of, how many it has, and its digest.
    """
    file = job.part(number)
    if not notes_of(file):
        write_atomic(file, _part_bytes(job, rows, before))
        flush()
    table = open_table(file)
    return {"read": len(rows), "rows": table.num_rows, "sha256": kept_fingerprint(file)}


def _part_bytes(job: Job, rows: Sequence[Raw], tally: Tally) -> bytes:
    for module in job.modules:
        importlib.import_module(module)
    folder, config, template = job.checkpoint
    if (folder, template) not in _processors:
        _processors[folder, template] = Processor(folder, config, template)
    processor = _processors[folder, template]
    media = MediaFolder(media_root(job.data.path, job.data.image_root))
    shown: list[Record] = []
    records = _records(job, rows, media, tally, shown)
    use, name = job.use, job.data.path
    used = tokenize_usable(records, name, processor, job.limits, tally, use.unfit, use.tokenize)
    made = [use.select(row) for _, row in used]
    table = encode_rows(made, [use.tell(row) for row in made], use.columns)
    # Of rows that were joined before, nobody has noted where images were missing.
    joined = any(isinstance(row, Record) for row in rows)
    missing = any(row.reason.startswith(("image_", "bad_video")) for row in tally.unreadable)
    media.searched |= joined and missing
    notes = {"tally": tally.to_json(), "seen": seen_by(shown, media).to_json()}
    metadata = {_NOTES: json.dumps(notes, ensure_ascii=False).encode()}
    return table_bytes(table.replace_schema_metadata(metadata))


def _records(
    job: Job, rows: Sequence[Raw], media: MediaFolder, tally: Tally, shown: list[Record]
) -> Iterator[Record]:
    """The records of rows, as `sources.load_file` has them.

    Args:
      shown: gets those whose images were looked at.
    """
    data, use = job.data, job.use
    for row in rows:
        if isinstance(row, Record):
            shown.append(row)
            yield scored_record(row, data)
            continue
        record = parse_row(
            row,
            data.path,
            media,
            use.messages_as,
            data.format,
            tally.notes,
            not use.supervised,
        )
        if isinstance(record, SkippedRow):
            tally.unreadable.append(record)
            continue
        extra = {name: record.extra[name] for name in SOLUTIONS if name in record.extra}
        plain = data.control_tokens == "text"
        record = dataclasses.replace(record, extra=extra, plain_text=plain)
        problem = media_problem(record)
        record = record if problem is not None else with_known_images(record)
        shown.append(record)
        if problem is not None:
            tally.broken.append(SkippedRow(data.path, record.row, record.id, *problem))
            continue
        if not use.supervised:
            if not record.prompt:
                tally.without_prompt.append(without_prompt(data.path, record))
                continue
            record = dataclasses.replace(record, responses=())
        yield scored_record(record, data)


def notes_of(file: str) -> dict[str, Any]:
    """What a part says beside its rows; empty where there is none that can be read."""
    try:
        metadata = open_table(file).schema.metadata or {}
        return json.loads(metadata.get(_NOTES, b"{}"))
    except (DataError, ValueError):
        return {}
