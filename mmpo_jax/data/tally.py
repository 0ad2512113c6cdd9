"""What becomes of the rows of a data set on the way to tokens: counts, and those left out."""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from collections.abc import Iterator
from typing import Any

from etils import epath

from mmpo_jax.core.errors import DataError
from mmpo_jax.core.processes import on_one
from mmpo_jax.data.notes import Notes, by_count
from mmpo_jax.data.processor import Processor
from mmpo_jax.data.records import Record
from mmpo_jax.data.skipped import SkippedRow, check_skipped, write_skipped

log = logging.getLogger(__name__)


@dataclasses.dataclass
class TextNotes:
    """What tokenizer and chat template make of texts that their writers may not have meant."""

    typed: Counter[str] = dataclasses.field(default_factory=Counter)
    """Rows by control token that is typed in a text."""
    unread: Counter[str] = dataclasses.field(default_factory=Counter)
    """Rows by key of messages, or argument, that the chat template does not read."""

    def add(self, record: Record, processor: Processor) -> None:
        """Counts a row."""
        keys = {key for turn in record.turns for key in turn.keys} | record.template.keys()
        self.unread.update(sorted(key for key in keys if not processor.reads_key(key)))
        if processor.tokenizer.is_fast and not record.plain_text:
            found = {name for text in record.texts for name in processor.control.found_in(text)}
            self.typed.update(sorted(found))

    def lines(self) -> Iterator[str]:
        """What the notes say, for a person."""
        if self.typed:
            yield (
                f"rows whose texts type control tokens: {by_count(self.typed)}; they are read as "
                "such, but for those of images (data.control_tokens: text makes them plain text)"
            )
        if self.unread:
            yield f"rows with what the chat template does not read: {by_count(self.unread)}"


@dataclasses.dataclass
class Tally:
    """What becomes of rows, by the step that leaves them out; those of parts add up."""

    notes: Notes = dataclasses.field(default_factory=Notes)
    unreadable: list[SkippedRow] = dataclasses.field(default_factory=list)
    """Rows of which no record is made."""
    broken: list[SkippedRow] = dataclasses.field(default_factory=list)
    """Rows with an image or a video that does not open."""
    without_prompt: list[SkippedRow] = dataclasses.field(default_factory=list)
    """Rows that ask nothing, where only prompts are read."""
    shown: int = 0
    """Responses left out as they hold a token that stands for media."""
    unsupported: list[SkippedRow] = dataclasses.field(default_factory=list)
    """Rows that show what the model does not take."""
    too_long: list[SkippedRow] = dataclasses.field(default_factory=list)
    """Rows that cannot be tokenised within the lengths."""
    unfit: list[SkippedRow] = dataclasses.field(default_factory=list)
    """Rows of no use for what they are read for."""
    joined: int = 0
    """Rows that went into others' rankings."""
    joining: str = ""
    """What the log says of that."""
    partly: list[SkippedRow] = dataclasses.field(default_factory=list)
    """Responses that alone were left out, of rows that went into rankings or can be used."""
    usable: int = 0
    """Rows that can be used."""
    blind: int = 0
    """Usable rows that show nothing."""
    cut: int = 0
    """Responses that lost their tail."""
    texts: TextNotes = dataclasses.field(default_factory=TextNotes)

    @property
    def skipped(self) -> list[SkippedRow]:
        """Rows left out, in the order of the steps."""
        return [
            *(*self.unreadable, *self.broken, *self.without_prompt),
            *(*self.unsupported, *self.too_long, *self.unfit),
        ]

    def add(self, other: Tally) -> None:
        """Adds what became of the rows that follow."""
        _add_fields(self, other)

    def to_json(self) -> dict[str, Any]:
        """JSON that `from_json` reads."""
        return _to_json(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Tally:
        """The tally of which `to_json` made the value."""
        tally = cls()
        _read_json(tally, value)
        return tally


def tell_notes(name: str, notes: Notes) -> None:
    """Says in the log what the rows of a set hold that is not read, or not as it is called."""
    for line in notes.lines():
        log.info("%s: %s", name, line)
    for line in notes.warnings():
        log.warning("%s: %s", name, line)


def settle(
    tally: Tally, name: str, skipped_file: str, max_skipped: float, sees: bool, limit: int | None
) -> None:
    """Writes the file of rows left out, and says in the log what became of the rows of a set.

    Args:
      tally: of the whole set.
      name: of the set.
      skipped_file: not written where everything can be used.
      max_skipped: share of rows that may be left out.
      sees: whether the model takes images.
      limit: tokens of a response; None for no limit.

    Raises:
      DataError: more rows were left out than that, or none can be used.
    """
    if tally.shown:
        log.warning("%s: responses left out of rows: image_position %d", name, tally.shown)
    on_one(lambda: _write_left_out(tally, skipped_file))
    for row in tally.skipped[:10]:
        log.warning("%s: skipped %s", row.file, row)
    total = tally.usable + len(tally.skipped) + tally.joined
    check_skipped(tally.skipped, total, max_skipped)
    if not tally.usable:
        raise DataError(f"{name}: no row that can be used")
    if sees and tally.blind:
        log.warning("%s: %d of %d rows have no image or video", name, tally.blind, tally.usable)
    for line in tally.texts.lines():
        log.warning("%s: %s", name, line)
    if limit is not None:
        warn_of_cuts(name, tally.cut, limit)


def _write_left_out(tally: Tally, skipped_file: str) -> None:
    if tally.skipped or tally.partly:
        write_skipped(skipped_file, [*tally.skipped, *tally.partly])
    else:  # of an earlier run, before the data were mended
        epath.Path(skipped_file).unlink(missing_ok=True)


def warn_of_cuts(name: str, cut: int, limit: int) -> None:
    """Says how many responses lost their tail to the largest bucket."""
    if cut:
        log.warning("%s: %d responses were cut to %d tokens", name, cut, limit)


def _add_fields(total: Any, other: Any) -> None:
    for field in dataclasses.fields(total):
        ours, theirs = getattr(total, field.name), getattr(other, field.name)
        if isinstance(ours, Counter):
            ours.update(theirs)
        elif isinstance(ours, list):
            ours.extend(theirs)
        elif dataclasses.is_dataclass(ours):
            _add_fields(ours, theirs)
        else:
            setattr(total, field.name, ours + theirs)


def _to_json(value: Any) -> Any:
    if isinstance(value, Counter):
        return dict(value)
    if isinstance(value, list):
        return [_to_json(item) for item in value]
    if dataclasses.is_dataclass(value):
        return {f.name: _to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    return value


def _read_json(target: Any, value: dict[str, Any]) -> None:
    for field in dataclasses.fields(target):
        given, held = value[field.name], getattr(target, field.name)
        if isinstance(held, Counter):
            held.update(given)
        elif isinstance(held, list):
            held.extend(SkippedRow(**row) for row in given)
        elif dataclasses.is_dataclass(held):
            _read_json(held, given)
        else:
            setattr(target, field.name, given)
