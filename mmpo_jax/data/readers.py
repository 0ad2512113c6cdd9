"""Read preference, prompt and supervised data.

What a row may hold is said in `mmpo_jax.data.formats`, what a file may be in
`mmpo_jax.data.tables`. A row that cannot be used becomes a `SkippedRow` and reading goes on. A
file that cannot be read is a `DataError`.
"""

import dataclasses
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from etils import epath

from mmpo_jax.core.errors import DataError
from mmpo_jax.core.files import check_reachable, write_atomic
from mmpo_jax.core.progress import counted
from mmpo_jax.data.formats import choose_format, format_called
from mmpo_jax.data.formats.columns import with_pictures
from mmpo_jax.data.formats.format import finish
from mmpo_jax.data.formats.media import MediaFolder
from mmpo_jax.data.ids import RowIds, own_id
from mmpo_jax.data.images import ImageTooLarge, image_size, open_image
from mmpo_jax.data.notes import Notes
from mmpo_jax.data.records import ANSWERS, ImageRef, Record, VideoRef
from mmpo_jax.data.rows import MessagesAs, Row, SkipReason, UnusableRow
from mmpo_jax.data.tables import folder_of, numbered_rows

Problem = tuple[SkipReason, str]
"""Why a row is left out: a word to count by, and what exactly is wrong, for a person."""

RESPONSES = frozenset(
    {
        *("chosen", "rejected", "rejected_response", "completion", "response", "responses"),
        *("response_ids", "finished", "label", "kto_tag", "score", "scores", "rank", "ranks"),
    }
)
"""Columns that say nothing of a prompt."""

_LONGEST_DETAIL = 500
"""Characters of what is wrong; a row may hold a picture where nobody expects one."""


@dataclasses.dataclass(frozen=True)
class SkippedRow:
    """A row that is left out.

    Attributes:
      row: number in its file from 1; the line number in JSONL. None where the row is from no file.
      id: the row's id, or empty where the row could not be read so far.
      reason: a stable word to count by.
      detail: what exactly is wrong, for a person.
    """

    file: str
    row: int | None
    id: str
    reason: SkipReason
    detail: str

    def __str__(self) -> str:
        names = [f"row {self.row}"] if self.row is not None else []
        names += [f"id {self.id!r}"] if self.id else []
        return f"{', '.join(names)}: {self.reason}: {self.detail}"


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
            kept = {name: item.extra[name] for name in ANSWERS if name in item.extra}
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
      path: the file, folder or TFDS name, see `mmpo_jax.data.tables`.
      image_root: the folder of the images, by default the one of the data file. Paths that leave
        it are refused.
      messages_as: what a row supervises that is a dialogue. "last_turn": the last assistant turn,
        the turns before it being the prompt. "dialogue": every assistant turn; the prompt is empty.
      format: one of `FORMATS`, or "auto" for each row's own.
      notes: counts what rows hold, where given.
      prompts_only: whether responses will not be read: a row that only they make unusable is read
        without them.

    Raises:
      DataError: the file is missing, unreadable or of an unknown kind, or the format is unknown.
    """
    given = None if format == "auto" else format_called(format)
    for place in (path, image_root):
        if place is not None:
            check_reachable(place)
    media = MediaFolder(folder_of(path) if image_root is None else image_root)
    notes = Notes() if notes is None else notes
    ids = RowIds()
    for number, row in numbered_rows(path, image_root):
        id_ = ""
        try:
            if isinstance(row, UnusableRow):
                raise row
            present = {name: value for name, value in row.items() if value is not None}
            convention = given or choose_format(present)
            notes.formats[convention.name] += 1
            own = own_id(present)
            id_ = ids.name(own, number)
            shown, column = with_pictures(present)
            try:
                draft = convention.read(shown, media, messages_as)
                record = finish(draft, id_, number, media)
            except UnusableRow as unusable:
                if not prompts_only:
                    raise
                try:
                    record = _prompt_alone(shown, id_, number, media, format)
                except UnusableRow:
                    raise unusable from None
        except UnusableRow as unusable:
            detail = unusable.detail[:_LONGEST_DETAIL]
            yield SkippedRow(os.fspath(path), number, id_, unusable.reason, detail)
        else:
            if own is not None and own != id_:
                record = dataclasses.replace(record, own_id=own)
            if column is not None:
                notes.pictures_in[column] += 1
            notes.add(record)
            yield record


def _prompt_alone(row: Row, id_: str, number: int, media: MediaFolder, format: str) -> Record:
    """The record of a row's prompt, whatever is wrong with its responses.

    Raises:
      UnusableRow: it has none that can be used.
    """
    asked = {name: value for name, value in row.items() if name not in RESPONSES}
    convention = choose_format(asked) if format == "auto" else format_called(format)
    return finish(convention.read(asked, media, "last_turn"), id_, number, media)


def left_out_rows(records: Iterable[Record], file: str) -> list[SkippedRow]:
    """The responses that alone were left out of records, as rows that say which."""
    return [
        SkippedRow(file, record.row, record.id, reason, f"response {place + 1}: {detail}")
        for record in records
        for place, reason, detail in record.left_out
    ]


def check_images(
    records: Iterable[Record], file: str = ""
) -> tuple[list[Record], list[SkippedRow]]:
    """Decode all images and frames once; separate the records with one that does not open.

    The frames of a video have to be of one size.
    """
    good: list[Record] = []
    skipped: list[SkippedRow] = []
    seen: dict[str, Problem | None] = {}
    for record in counted(records, "checking images"):
        problem = media_problem(record, seen)
        if problem is None:
            good.append(record)
        else:
            skipped.append(SkippedRow(file, record.row, record.id, *problem))
    return good, skipped


def media_problem(record: Record, seen: dict[str, Problem | None]) -> Problem | None:
    """Why an image or a video of a record cannot be used; None where all can.

    Args:
      seen: what is known of files, by path; it grows.
    """
    frames = [frame for video in record.videos for frame in video.frames]
    own = [image for response in record.responses for image in response.images or ()]
    for image in (*record.images, *(record.other_images or ()), *own, *frames):
        problem = _image_problem(image, seen)
        if problem is not None:
            return problem
    uneven = next(filter(None, map(_uneven, record.videos)), None)
    return None if uneven is None else ("bad_video_entry", uneven)


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
    lines += [f"  {row.file}: {row}" for row in skipped[:5]]
    raise DataError("\n".join(lines))


def write_skipped(path: epath.PathLike, skipped: Iterable[SkippedRow]) -> None:
    """Write skipped rows as JSONL, one object with the fields of `SkippedRow` a line.

    Raises:
      OSError: the file could not be written.
    """
    lines = [json.dumps(dataclasses.asdict(row)) + "\n" for row in skipped]
    write_atomic(path, "".join(lines).encode())


def _image_problem(image: ImageRef, seen: dict[str, Problem | None]) -> Problem | None:
    """Why an image does not open, or None; a file that many rows share is opened once."""
    key = None if image.path is None else os.fspath(image.path)
    if key is not None and key in seen:
        return seen[key]
    problem: Problem | None = None
    try:
        open_image(image)
    except ImageTooLarge as error:
        problem = "image_too_large", str(error)
    except DataError as error:
        problem = "image_broken", str(error)
    if key is not None:
        seen[key] = problem
    return problem


def _uneven(video: VideoRef) -> str | None:
    """What is wrong with the sizes of a video's frames, or None."""
    sizes = {image_size(frame) for frame in video.frames}
    return f"{video.name} has frames of sizes {sorted(sizes)}" if len(sizes) > 1 else None
