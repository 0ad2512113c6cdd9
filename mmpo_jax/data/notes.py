"""What reading a file brings up beside its records: counts, for the log and for `data check`."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator

from mmpo_jax.data.formats.columns import may_hold_pictures
from mmpo_jax.data.records import SOLUTIONS, Record

LOG_PROBS = "logps"
"""The column of RLAIF-V's with log-probs, of which we read the sums."""
TOKEN_IDS = "response_ids"
"""The column with the tokens of responses that were sampled; left where they are of others."""
_LONGEST = 12
"""Columns that one line names."""


@dataclasses.dataclass
class Notes:
    """Counts of a file's rows."""

    formats: Counter[str] = dataclasses.field(default_factory=Counter)
    """Rows by format, usable or not."""
    ignored: Counter[str] = dataclasses.field(default_factory=Counter)
    """Usable rows, as in all that follow, by column that means nothing here."""
    pictures_in: Counter[str] = dataclasses.field(default_factory=Counter)
    """Rows by column of another name that was read as the images."""
    unread_pictures: Counter[str] = dataclasses.field(default_factory=Counter)
    """Rows that show nothing, by column or key of messages that looks like one of pictures."""
    media_keys: Counter[str] = dataclasses.field(default_factory=Counter)
    """Rows by key of an image's or a video's entry that means nothing here."""
    left_out: Counter[str] = dataclasses.field(default_factory=Counter)
    """Responses that alone could not be used, by reason."""
    unread_ids: int = 0
    """Rows whose ids of sampled tokens are not read, as they do not go with the responses."""
    repeated_ids: int = 0
    """Rows with an id that an earlier row has."""

    def add(self, record: Record) -> None:
        """Counts a usable row."""
        read = [*SOLUTIONS]
        if any(response.log_prob is not None for response in record.responses):
            read.append(LOG_PROBS)  # and kept, as it says more
        if isinstance(record.extra.get(TOKEN_IDS), list) and record.responses:
            read.append(TOKEN_IDS)
            self.unread_ids += 1
        columns = [name for name in record.extra if name not in read]
        self.ignored.update(columns)
        self.repeated_ids += record.own_id is not None
        self.left_out.update(reason for _, reason, _ in record.left_out)
        if not shows_something(record):
            keys = {name: value for turn in record.turns for name, value in turn.keys.items()}
            unread = {**keys, **{name: record.extra[name] for name in columns}}
            self.unread_pictures.update(
                name for name, value in unread.items() if may_hold_pictures(name, value)
            )

    def lines(self) -> Iterator[str]:
        """What the notes say, for a person."""
        if self.pictures_in:
            yield f"pictures are read from columns of other names: {by_count(self.pictures_in)}"
        if self.repeated_ids:
            yield (
                f"rows that repeat an earlier row's id: {self.repeated_ids}; their ids here are "
                "'ID (row N)'"
            )
        if self.left_out:
            yield f"responses left out of rows that are used: {by_count(self.left_out)}"
        if self.unread_ids:
            yield f"rows whose {TOKEN_IDS} are not read: {self.unread_ids}; the texts are tokenized"
        if self.ignored:
            yield f"columns that mean nothing here: {by_count(self.ignored)}"
        if self.media_keys:
            yield f"keys of images and videos that mean nothing here: {by_count(self.media_keys)}"

    def warnings(self) -> Iterator[str]:
        """What is likely to be a mistake."""
        if self.unread_pictures:
            yield (
                "columns, or keys of messages, that look like pictures and are NOT read, in rows "
                "that show nothing: "
                f"{by_count(self.unread_pictures)}; give the pictures as files in a column 'images'"
            )


def shows_something(record: Record) -> bool:
    """Whether a record has an image or a video."""
    own = any(response.images for response in record.responses)
    return bool(record.images or record.videos or own)


def by_count(counts: Counter[str]) -> str:
    """Names with their counts, the most frequent first, for a person."""
    named = [f"{name} {count}" for name, count in counts.most_common(_LONGEST)]
    more = len(counts) - len(named)
    return ", ".join(named) + (f" and {more} more" if more else "")
