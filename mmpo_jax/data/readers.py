"""Read preference, prompt and supervised data from JSONL and Parquet files.

What a row may hold is said in `mmpo_jax.data.rows`. A row that cannot be used becomes a
`SkippedRow` and reading goes on. A file that cannot be read is a `DataError`.
"""

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from etils import epath

from mmpo_jax.data.images import image_size, open_image
from mmpo_jax.data.records import ImageRef, Record, VideoRef
from mmpo_jax.data.rows import MessagesAs, SkipReason, UnusableRow, parse_row, row_id
from mmpo_jax.errors import DataError
from mmpo_jax.files import write_atomic

_PARQUET_BATCH_ROWS = 64  # Rows hold whole images: this is memory, not speed.


@dataclass(frozen=True)
class SkippedRow:
    """A row that is left out.

    Attributes:
      row: number in its file from 1; the line number in JSONL. None where only the id is known.
      id: the row's id, or empty where the row could not be read so far.
      reason: a stable word to count by.
      detail: what exactly is wrong, for a person.
    """

    file: str
    row: int | None
    id: str
    reason: SkipReason
    detail: str


def read_records(
    path: epath.PathLike,
    image_root: epath.PathLike | None = None,
    messages_as: MessagesAs = "last_turn",
) -> tuple[list[Record], list[SkippedRow]]:
    """All usable records of a file, in order, and the rows left out.

    See `iter_records`, which this collects, for arguments and errors.
    """
    records: list[Record] = []
    skipped: list[SkippedRow] = []
    for item in iter_records(path, image_root, messages_as):
        if isinstance(item, Record):
            records.append(item)
        else:
            skipped.append(item)
    return records, skipped


def iter_records(
    path: epath.PathLike,
    image_root: epath.PathLike | None = None,
    messages_as: MessagesAs = "last_turn",
) -> Iterator[Record | SkippedRow]:
    """Read a ``.jsonl`` or ``.parquet`` file row by row; images are found but not decoded.

    Args:
      path: the data file.
      image_root: the folder of the images, by default the one of the data file. Paths that leave
        it are refused.
      messages_as: what a ``messages`` row supervises. "last_turn": the last assistant turn, the
        turns before it being the prompt. "dialogue": every assistant turn; the prompt is empty.

    Raises:
      DataError: the file is missing, unreadable or of an unknown kind, or an id occurs twice.
    """
    path = epath.Path(path)
    root = path.parent if image_root is None else epath.Path(image_root)
    first_row: dict[str, int] = {}
    for number, row in _numbered_rows(path):
        id_ = ""
        try:
            if isinstance(row, UnusableRow):
                raise row
            id_ = row_id(row, number)
            if id_ in first_row:
                raise DataError(
                    f"{os.fspath(path)}: rows {first_row[id_]} and {number} "
                    f"have the same id {id_!r}"
                )
            first_row[id_] = number
            yield parse_row(row, id_, root, messages_as)
        except UnusableRow as unusable:
            yield SkippedRow(os.fspath(path), number, id_, unusable.reason, unusable.detail)


def check_images(
    records: Iterable[Record], file: str = ""
) -> tuple[list[Record], list[SkippedRow]]:
    """Decode all images and frames once; separate the records with one that does not open.

    The frames of a video have to be of one size.
    """
    good: list[Record] = []
    skipped: list[SkippedRow] = []
    seen: dict[str, str | None] = {}
    for record in records:
        frames = [frame for video in record.videos for frame in video.frames]
        problems = (_image_problem(image, seen) for image in (*record.images, *frames))
        problem = next((problem for problem in problems if problem is not None), None)
        uneven = None if problem else next(filter(None, map(_uneven, record.videos)), None)
        if problem is not None:
            skipped.append(SkippedRow(file, None, record.id, "image_broken", problem))
        elif uneven is not None:
            skipped.append(SkippedRow(file, None, record.id, "bad_video_entry", uneven))
        else:
            good.append(record)
    return good, skipped


def check_skipped(skipped: Sequence[SkippedRow], total: int, max_share: float) -> None:
    """Refuse data of which too large a share was left out.

    Raises:
      DataError: more than `max_share` of `total` rows are in `skipped`, or there are no rows. The
        message counts the reasons and shows the first few rows.
    """
    if total == 0:
        raise DataError("the data has no rows")
    if len(skipped) <= max_share * total:
        return
    counts = Counter(row.reason for row in skipped).most_common()
    lines = [
        f"{len(skipped)} of {total} rows cannot be used, more than the allowed {max_share:.1%}: "
        + ", ".join(f"{reason} {count}" for reason, count in counts)
    ]
    for row in skipped[:5]:
        where = "" if row.row is None else f" row {row.row}"
        lines.append(f"  {row.file}{where} (id {row.id!r}): {row.reason}: {row.detail}")
    raise DataError("\n".join(lines))


def write_skipped(path: epath.PathLike, skipped: Iterable[SkippedRow]) -> None:
    """Write skipped rows as JSONL, one object with the fields of `SkippedRow` a line.

    Raises:
      OSError: the file could not be written.
    """
    lines = [json.dumps(asdict(row)) + "\n" for row in skipped]
    write_atomic(path, "".join(lines).encode())


def _image_problem(image: ImageRef, seen: dict[str, str | None]) -> str | None:
    """Why an image does not open, or None; a file that many rows share is opened once."""
    key = None if image.path is None else os.fspath(image.path)
    if key is not None and key in seen:
        return seen[key]
    try:
        open_image(image)
        problem = None
    except DataError as error:
        problem = str(error)
    if key is not None:
        seen[key] = problem
    return problem


def _uneven(video: VideoRef) -> str | None:
    """What is wrong with the sizes of a video's frames, or None."""
    sizes = {image_size(frame) for frame in video.frames}
    return f"{video.name} has frames of sizes {sorted(sizes)}" if len(sizes) > 1 else None


def _numbered_rows(path: epath.Path) -> Iterator[tuple[int, dict[str, Any] | UnusableRow]]:
    """Rows with their numbers from 1; a row that is no object comes as what is wrong with it."""
    readers = {".jsonl": _jsonl_rows, ".ndjson": _jsonl_rows, ".parquet": _parquet_rows}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{os.fspath(path)}: data files end in {', '.join(readers)}")
    try:
        yield from reader(path)
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"cannot read {os.fspath(path)}: {reason}") from error


def _jsonl_rows(path: epath.Path) -> Iterator[tuple[int, dict[str, Any] | UnusableRow]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig"))
            except (ValueError, RecursionError) as error:
                yield number, UnusableRow("bad_json", str(error))
                continue
            if isinstance(row, dict):
                yield number, row
            else:
                detail = f"a {type(row).__name__} and not an object"
                yield number, UnusableRow("bad_json", detail)


def _parquet_rows(path: epath.Path) -> Iterator[tuple[int, dict[str, Any] | UnusableRow]]:
    number = 0
    with path.open("rb") as file:
        for batch in pq.ParquetFile(file).iter_batches(batch_size=_PARQUET_BATCH_ROWS):
            for row in batch.to_pylist():
                number += 1
                yield number, row
