"""A stage that reads, checks and tokenises the rows of a file, in parts and by several processes.

    rows.json                 what the parts were made of, and their digests; written last
    rows.parts-<key>/00003.arrow

A part holds rows of `row_tables`, and with them what became of the rows of the file that it covers,
so that a run that finds the parts says what the run that made them said.
"""

from __future__ import annotations

import functools
import itertools
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import transformers
from etils import epath

from mmpo_jax.core import progress
from mmpo_jax.core.errors import DataError
from mmpo_jax.core.files import (
    cache_folder,
    fingerprint_bytes,
    fingerprint_json,
    is_local,
    read_bytes,
    read_json,
    write_atomic,
)
from mmpo_jax.core.known_files import flush, kept_fingerprint
from mmpo_jax.core.processes import alone, check_same, on_one, wait_for
from mmpo_jax.core.workers import in_order
from mmpo_jax.data.agreement import check_same_images
from mmpo_jax.data.files import count_rows, find_files, fingerprint_rows, rows_of
from mmpo_jax.data.formats import FORMATS
from mmpo_jax.data.image_states import Seen, changed
from mmpo_jax.data.lengths import Lengths
from mmpo_jax.data.parsing import NamedRow, name_rows
from mmpo_jax.data.processor import Processor
from mmpo_jax.data.readers import TFDS, media_root
from mmpo_jax.data.records import Record
from mmpo_jax.data.row_parts import Job, Raw, RowUse, given, make_part, notes_of
from mmpo_jax.data.sources import FileData, LearnedFile, load_file
from mmpo_jax.data.tally import Tally, settle, tell_notes
from mmpo_jax.data.tokenized_rows import StoredTable, TokenizedRows
from mmpo_jax.data.usable import limits_of

log = logging.getLogger(__name__)

RULES = 3
"""Part of the key: changes with what is made of the same rows."""
PART_ROWS = 512
PART_BYTES = 1 << 24
"""A part ends with the row that reaches either: a kill loses no more for each process."""
ALONE = 4
"""Parts that are made without other processes, which take seconds to begin."""
_KEY_CHARACTERS = 16


def tokenized_rows(
    data: FileData,
    use: RowUse,
    processor: Processor,
    lengths: Lengths | None,
    *,
    folder: str,
    name: str,
    skipped_file: str,
    workers: int,
) -> TokenizedRows:
    """The rows of a file that can be used, tokenised, from disk: made now as far as they are not.

    Args:
      data: the recipe's section.
      use: what they are read for.
      processor: of the checkpoint.
      lengths: bucket sizes; the largest are the limits. None for no limits.
      folder: of the stage, which the first of several processes makes; where that is in a bucket,
        parts lie in the cache of each machine.
      name: of the stage.
      skipped_file: lists rows that are left out; not written where everything can be used.
      workers: processes; the result does not depend on them.

    Raises:
      DataError: the file cannot be read, more rows were left out than the recipe allows, or none
        can be used.
      MmpoError: another process has other rows or images.
    """
    is_shared = is_local(folder)
    if not is_shared:
        folder = os.path.join(cache_folder(), "rows", fingerprint_json(folder)[:_KEY_CHARACTERS])
    media_root(data.path, data.image_root)  # which has to be within reach
    files = find_files(data.path)
    made_of = _made_of(data, use, processor, lengths, files)
    key = fingerprint_json(made_of)
    check_same(f"{data.path}: the data", lambda: key)
    job = Job(
        data,
        use,
        os.path.join(folder, f"{name}.parts-{key[:_KEY_CHARACTERS]}"),
        (processor.folder, processor.config, processor.template),
        limits_of(lengths),
        tuple(sorted({*use.modules, *(format.read.__module__ for format in FORMATS.values())})),
    )
    manifest = os.path.join(folder, f"{name}.json")

    def find_or_make() -> tuple[list[dict[str, Any]], bool]:
        """The parts, and whether they were made now."""
        parts = _finished(job, read_json(manifest), key)
        if parts is not None:
            return parts, False
        parts = _make_parts(job, files, processor, workers)
        text = json.dumps({"made_of": made_of, "key": key, "parts": parts}, indent=1)
        write_atomic(manifest, text.encode())
        _remove_others(job.folder, name)
        return parts, True

    if is_shared:
        parts, made = on_one(find_or_make)
        for number in range(len(parts)):
            wait_for(functools.partial(_there, job.part(number)), job.part(number))
    else:  # the cache is this machine's own
        with alone():
            parts, made = find_or_make()
        check_same(f"{data.path}: the data", lambda: fingerprint_json(parts))
    seen = (Seen.from_json(notes_of(job.part(number))["seen"]) for number in range(len(parts)))
    check_same_images(data.path, seen)
    told = made and _joins(data, use)
    tally = Tally()
    for number in range(len(parts)):
        tally.add(Tally.from_json(notes_of(job.part(number))["tally"]))
    if not told:  # by reading all at once
        tell_notes(data.path, tally.notes)
        if tally.joining:
            log.info("%s: %s", data.path, tally.joining)
    limit = None if lengths is None else lengths.response[-1]
    settle(tally, data.path, skipped_file, data.max_skipped, processor.images is not None, limit)
    tables = [StoredTable(job.part(i), part["rows"]) for i, part in enumerate(parts)]
    return TokenizedRows(tables, processor)


def can_be_stored(data: Any) -> bool:
    """Whether `tokenized_rows` reads such a section."""
    return isinstance(data, FileData) and not data.path.startswith(TFDS)


def _made_of(
    data: FileData,
    use: RowUse,
    processor: Processor,
    lengths: Lengths | None,
    files: Sequence[epath.Path],
) -> dict[str, Any]:
    section = data.model_dump(mode="json", exclude={"max_skipped", "weight"})
    if section.get("rewards") is None:  # as it was before there were any
        section.pop("rewards", None)
    else:
        section["rewards"] = fingerprint_bytes(read_bytes(section["rewards"]))
    return {
        "rules": RULES,
        "rows": fingerprint_rows(files),
        "data": section,
        "use": use.key(),
        "limits": limits_of(lengths),
        **processor.fingerprints(),
        "config": fingerprint_json(repr(processor.config)),
        "transformers": transformers.__version__,
    }


def _finished(job: Job, manifest: Mapping[str, Any], key: str) -> list[dict[str, Any]] | None:
    """The parts of the manifest, if it is of this key and they are as they were made."""
    if manifest.get("key") != key:
        return None
    files = [job.part(number) for number in range(len(manifest["parts"]))]
    damaged = [
        file
        for file, part in zip(files, manifest["parts"], strict=True)
        if _digest(file) != part["sha256"]
    ]
    for file in damaged:
        log.warning("%s is not what its manifest says, and is made again", file)
        _remove(file)
    if damaged or not _drop_changed(job, files):
        return None
    return manifest["parts"]


def _drop_changed(job: Job, files: Sequence[str]) -> bool:
    """Removes parts whose images are others now; whether all stay.

    Where all records are needed to make one, none of the parts stays if one does not.
    """
    with progress.doing("looking whether images have changed", len(files), "parts") as activity:
        notes = ((file, notes_of(file)) for file in files)
        seen = [(file, Seen.from_json(said["seen"])) for file, said in notes if said]
        stale = changed([one for _, one in seen], activity.advance)
    dropped = files if stale and _joins(job.data, job.use) else [seen[place][0] for place in stale]
    for file in dropped:
        _remove(file)
    return len(seen) == len(files) and not stale


def _make_parts(
    job: Job, files: Sequence[epath.Path], processor: Processor, workers: int
) -> list[dict[str, Any]]:
    """Makes the parts that are not there; says of all how many rows they have, and their digest."""
    os.makedirs(job.folder, exist_ok=True)
    there = sorted(name for name in os.listdir(job.folder) if name.endswith(".arrow"))
    _drop_changed(job, [os.path.join(job.folder, name) for name in there])
    name = f"reading and tokenising {job.data.path}"
    with progress.doing(name, count_rows(files)) as activity, given(job, processor):
        parts: list[dict[str, Any]] = []
        raw = _raw_parts(job, files)
        first = list(itertools.islice(raw, ALONE + 1))
        alone = len(first) <= ALONE or workers < 2 or "__main__" in job.modules
        calls = ((job, *part) for part in itertools.chain(first, raw))
        made = itertools.starmap(make_part, calls) if alone else in_order(make_part, calls, workers)
        for part in made:
            activity.advance(part.pop("read"))
            parts.append(part)
    flush()
    return parts


def _raw_parts(job: Job, files: Sequence[epath.Path]) -> Iterator[tuple[int, Sequence[Raw], Tally]]:
    """(number, rows, what became of rows before) of every part, one at least."""
    before, rows = Tally(), iter(name_rows(rows_of(files, job.data.path), job.data.format))
    raw: Iterator[Raw] = rows
    if _joins(job.data, job.use):
        found = load_file(job.data, job.use.supervised, job.use.messages_as)
        before = Tally(
            notes=found.notes,
            unreadable=found.skipped,
            joined=found.joined,
            joining=found.joining,
            partly=[*found.partly],
        )
        raw = iter(found.records)
    part: list[Raw] = []
    number, size = 0, 0
    for row in raw:
        part.append(row)
        size += _weight(row.row) if isinstance(row, NamedRow) else _weight_of_images(row)
        if len(part) >= PART_ROWS or size >= PART_BYTES:
            yield number, part, before
            part, number, size, before = [], number + 1, 0, Tally()
    if part or not number:
        yield number, part, before


def _joins(data: FileData, use: RowUse) -> bool:
    """Whether all records are needed to make one."""
    return use.supervised and isinstance(data, LearnedFile) and data.join_pairs


def _weight(value: Any) -> int:
    """Bytes and characters of a value, roughly."""
    if isinstance(value, bytes | str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(map(_weight, value.values()))
    return sum(map(_weight, value)) if isinstance(value, list) else 0


def _weight_of_images(record: Record) -> int:
    return sum(len(image.data or b"") for image in record.images)


def _digest(file: str) -> str | None:
    """SHA-256 of a part; None where it is missing."""
    try:
        return kept_fingerprint(file)
    except DataError:
        return None


def _there(file: str) -> bool | None:
    return os.path.isfile(file) or None


def _remove(file: str) -> None:
    epath.Path(file).unlink(missing_ok=True)


def _remove_others(folder: str, name: str) -> None:
    """Removes the parts of other settings."""
    for other in epath.Path(folder).parent.glob(f"{name}.parts-*"):
        if os.path.basename(folder) != other.name:
            shutil.rmtree(other, ignore_errors=True)
