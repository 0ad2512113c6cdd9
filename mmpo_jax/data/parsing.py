"""From rows to records: each row by its format, checked; what cannot be used is set apart.

What a row may hold is said in `mmpo_jax.data.formats`.
"""

import dataclasses
from collections.abc import Iterable, Iterator

from mmpo_jax.data.formats import choose_format, format_called
from mmpo_jax.data.formats.columns import with_pictures
from mmpo_jax.data.formats.format import finish
from mmpo_jax.data.formats.media import MediaFolder
from mmpo_jax.data.ids import RowIds, own_id
from mmpo_jax.data.notes import Notes
from mmpo_jax.data.records import Record
from mmpo_jax.data.rows import MessagesAs, Row
from mmpo_jax.data.skipped import MaybeRow, SkippedRow, UnusableRow

RESPONSES = frozenset(
    {
        *("chosen", "rejected", "rejected_response", "completion", "response", "responses"),
        *("response_ids", "finished", "label", "kto_tag", "score", "scores", "rank", "ranks"),
    }
)
"""Columns that say nothing of a prompt."""

_LONGEST_DETAIL = 500
"""Characters of what is wrong; a row may hold a picture where nobody expects one."""


def parse_rows(
    rows: Iterable[tuple[int, MaybeRow]],
    file: str,
    media: MediaFolder,
    messages_as: MessagesAs = "last_turn",
    format: str = "auto",
    notes: Notes | None = None,
    prompts_only: bool = False,
) -> Iterator[Record | SkippedRow]:
    """The records of rows, one by one; images are found but not decoded.

    Args:
      rows: with their numbers from 1.
      file: how messages call what the rows are from.
      media: finds the images that rows name.
      messages_as: what a row supervises that is a dialogue. "last_turn": the last assistant turn,
        the turns before it being the prompt. "dialogue": every assistant turn; the prompt is empty.
      format: one of `FORMATS`, or "auto" for each row's own.
      notes: counts what rows hold, where given.
      prompts_only: whether responses will not be read: a row that only they make unusable is read
        without them.

    Raises:
      DataError: the format is unknown.
    """
    notes = Notes() if notes is None else notes
    for row in name_rows(rows, format):
        yield parse_row(row, file, media, messages_as, format, notes, prompts_only)


@dataclasses.dataclass(frozen=True)
class NamedRow:
    """A row with the id it has among all rows of its file."""

    number: int
    """Number in its file, from 1."""
    row: MaybeRow
    """Columns that are not null, or what is wrong with it."""
    id: str = ""
    """Unique id; empty where the row is unusable."""
    own_id: str | None = None
    """Id that the row gives itself."""
    format: str | None = None
    """Name of its format; None where it has none."""


def name_rows(rows: Iterable[tuple[int, MaybeRow]], format: str = "auto") -> Iterator[NamedRow]:
    """Rows with their ids and formats, which depend on the rows before; the rest does not.

    Raises:
      DataError: the format is unknown.
    """
    given = None if format == "auto" else format_called(format)
    ids = RowIds()
    for number, row in rows:
        convention = None
        try:
            if isinstance(row, UnusableRow):
                raise row
            present = {name: value for name, value in row.items() if value is not None}
            found = given or choose_format(present)
            convention = found.name
            own = own_id(present, found.ids)
        except UnusableRow as unusable:
            yield NamedRow(number, unusable, format=convention)
        else:
            yield NamedRow(number, present, ids.name(own, number), own, convention)


def parse_row(
    named: NamedRow,
    file: str,
    media: MediaFolder,
    messages_as: MessagesAs,
    format: str,
    notes: Notes,
    prompts_only: bool,
) -> Record | SkippedRow:
    """The record of a row, or why it is left out; see `parse_rows`."""
    if named.format is not None:
        notes.formats[named.format] += 1
    media.unread_keys.clear()
    try:
        if isinstance(named.row, UnusableRow):
            raise named.row
        assert named.format is not None
        shown, column = with_pictures(named.row)
        try:
            draft = format_called(named.format).read(shown, media, messages_as)
            record = finish(draft, named.id, named.number, media)
        except UnusableRow as unusable:
            if not prompts_only:
                raise
            try:
                record = _prompt_alone(shown, named.id, named.number, media, format)
            except UnusableRow:
                raise unusable from None
    except UnusableRow as unusable:
        detail = unusable.detail[:_LONGEST_DETAIL]
        return SkippedRow(file, named.number, named.id, unusable.reason, detail)
    if named.own_id is not None and named.own_id != named.id:
        record = dataclasses.replace(record, own_id=named.own_id)
    if column is not None:
        notes.pictures_in[column] += 1
    notes.media_keys.update(sorted(media.unread_keys))
    notes.add(record)
    return record


def _prompt_alone(row: Row, id_: str, number: int, media: MediaFolder, format: str) -> Record:
    """The record of a row's prompt, whatever is wrong with its responses.

    Raises:
      UnusableRow: it has none that can be used.
    """
    asked = {name: value for name, value in row.items() if name not in RESPONSES}
    convention = choose_format(asked) if format == "auto" else format_called(format)
    return finish(convention.read(asked, media, "last_turn"), id_, number, media)
