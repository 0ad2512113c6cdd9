"""Read preference, prompt and supervised data.

What a file may be is said in `mmpo_jax.data.files`; rows become records in `mmpo_jax.data.parsing`.
A row that cannot be used becomes a `SkippedRow` and reading goes on. A file that cannot be read is
a `DataError`.
"""

import dataclasses
import os
from collections.abc import Iterable, Iterator

from etils import epath

from mmpo_jax.core.files import check_reachable
from mmpo_jax.core.progress import counted
from mmpo_jax.data.files import file_rows, folder_of
from mmpo_jax.data.formats.media import MediaFolder
from mmpo_jax.data.notes import Notes
from mmpo_jax.data.parsing import parse_rows
from mmpo_jax.data.records import SOLUTIONS, Record
from mmpo_jax.data.rows import MessagesAs
from mmpo_jax.data.skipped import MaybeRow, SkippedRow

TFDS = "tfds:"
"""What names of data sets of TFDS begin with."""
TFDS_BUILDERS = ["mmpo_jax.data.builders"]
"""Modules that register builders with TFDS when they are imported."""


def read_records(
    path: epath.PathLike,
    image_root: epath.PathLike | None = None,
    messages_as: MessagesAs = "last_turn",
    format: str = "auto",
    notes: Notes | None = None,
    prompts_only: bool = False,
) -> tuple[list[Record], list[SkippedRow]]:
    """All usable records of a file, in order, and the rows left out.

    See `iter_records`, which this collects, for arguments and errors.
    """
    records: list[Record] = []
    skipped: list[SkippedRow] = []
    rows = iter_records(path, image_root, messages_as, format, notes, prompts_only)
    for item in counted(rows, f"reading {os.fspath(path)}"):
        if isinstance(item, Record):
            kept = {name: item.extra[name] for name in SOLUTIONS if name in item.extra}
            records.append(dataclasses.replace(item, extra=kept))
        else:
            skipped.append(item)
    return records, skipped


def iter_records(
    path: epath.PathLike,
    image_root: epath.PathLike | None = None,
    messages_as: MessagesAs = "last_turn",
    format: str = "auto",
    notes: Notes | None = None,
    prompts_only: bool = False,
) -> Iterator[Record | SkippedRow]:
    """Read data row by row; images are found but not decoded.

    Args:
      path: the file or folder, see `mmpo_jax.data.files`; or ``tfds:NAME#SPLIT``, a data set that
        TFDS prepared, see `mmpo_jax.data.tfds_rows`.
      image_root: the folder of the images, by default the one of the data file. Paths that leave
        it are refused. Of names of TFDS, its data folder.
      messages_as, format, notes, prompts_only: see `mmpo_jax.data.parsing.parse_rows`.

    Raises:
      DataError: the file is missing, unreadable or of an unknown kind, or the format is unknown.
    """
    media = MediaFolder(media_root(path, image_root))
    name = os.fspath(path)
    rows: Iterable[tuple[int, MaybeRow]]
    if name.startswith(TFDS):
        from mmpo_jax.data.tfds_rows import tfds_rows  # imports half a second's worth

        rows = tfds_rows(name.removeprefix(TFDS), image_root, TFDS_BUILDERS)
    else:
        rows = file_rows(path)
    yield from parse_rows(rows, name, media, messages_as, format, notes, prompts_only)


def media_root(path: epath.PathLike, image_root: epath.PathLike | None) -> epath.PathLike:
    """The folder of the images of a file.

    Raises:
      MmpoError: one of them cannot be reached.
    """
    for place in (path, image_root):
        if place is not None:
            check_reachable(place)
    return folder_of(path) if image_root is None else image_root


def left_out_rows(records: Iterable[Record], file: str) -> list[SkippedRow]:
    """The responses that alone were left out of records, as rows that say which."""
    return [
        SkippedRow(file, record.row, record.id, reason, f"response {place + 1}: {detail}")
        for record in records
        for place, reason, detail in record.left_out
    ]
