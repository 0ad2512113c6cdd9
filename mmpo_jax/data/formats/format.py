"""What a format is: how its rows become records, and records its rows."""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mmpo_jax.data.formats.entries import read_column
from mmpo_jax.data.formats.media import MediaFolder
from mmpo_jax.data.formats.turns import (
    IMAGE,
    VIDEO,
    Turns,
    check_dialogue,
    check_prompt,
    check_response,
)
from mmpo_jax.data.formats.writing import Writer
from mmpo_jax.data.records import ImageRef, Record, Response, Turn, VideoRef
from mmpo_jax.data.rows import MessagesAs, Row, SkipReason, UnusableRow, brief


@dataclasses.dataclass(frozen=True)
class Answer:
    """A response as a row gives it.

    Attributes:
      prompt: in place of the row's.
      fields: of `Response`, beside turns and prompt.
    """

    turns: Turns
    prompt: Turns | None = None
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Draft:
    """What a row says, not checked yet.

    Attributes:
      extra: columns that the record has no place for.
    """

    prompt: Turns
    answers: tuple[Answer, ...]
    images: tuple[ImageRef, ...] = ()
    videos: tuple[VideoRef, ...] = ()
    other_images: tuple[ImageRef, ...] | None = None
    source: str | None = None
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Format:
    """A convention for rows.

    Attributes:
      claims: whether a row's columns are this format's.
      read: what a row says; raises `UnusableRow`.
      write: a row of a record whose fields it can hold; raises `CannotHold`.
      holds: of `writing.fields_of`, what its rows have a place for.
    """

    name: str
    claims: Callable[[Row], bool]
    read: Callable[[Row, MediaFolder, MessagesAs], Draft]
    write: Callable[[Record, Writer], dict[str, Any]]
    holds: frozenset[str]


def finish(draft: Draft, id_: str, number: int) -> Record:
    """The record of a draft.

    Args:
      number: of the row.

    Raises:
      UnusableRow: something in it cannot be meant.
    """
    videos = (VIDEO,) * len(draft.videos)
    others = [] if draft.other_images is None else [draft.other_images]
    for place, answer in enumerate(draft.answers, start=1):
        # Each response is checked with its prompt, as the model will see it.
        prompt = draft.prompt if answer.prompt is None else answer.prompt
        own = answer.fields.get("images")
        try:
            check_response(prompt, answer.turns)
            for images in [draft.images, *others] if own is None else [own]:
                check_dialogue(prompt + answer.turns, (*(IMAGE,) * len(images), *videos))
        except UnusableRow as error:
            if len(draft.answers) == 1:
                raise
            raise UnusableRow(error.reason, f"response {place}: {error.detail}") from error
    if not draft.answers:
        check_prompt(draft.prompt)
        check_dialogue(draft.prompt, ((IMAGE,) * len(draft.images)) + videos)
    responses = tuple(_response(answer) for answer in draft.answers)
    ranked = [response.rank is not None for response in responses]
    if any(ranked) and not all(ranked):
        detail = f"{sum(ranked)} of {len(ranked)} responses have a rank"
        raise UnusableRow("rank_count", detail)
    return Record(
        id=id_,
        images=draft.images,
        prompt=_spoken(draft.prompt),
        responses=responses,
        videos=draft.videos,
        other_images=draft.other_images,
        source=draft.source,
        row=number,
        extra=draft.extra,
    )


def _response(answer: Answer) -> Response:
    prompt = None if answer.prompt is None else _spoken(answer.prompt)
    response = Response(_spoken(answer.turns), prompt=prompt, **answer.fields)
    for span in response.spans:
        if not 0 <= span.start < span.end <= len(response.text):
            detail = f"characters {span.start} to {span.end} of {len(response.text)}"
            raise UnusableRow("bad_span", detail)
    return response


def _spoken(turns: Turns) -> tuple[Turn, ...]:
    return tuple(turn for turn, _ in turns)


def rest(row: Row, *columns: str, source: str = "source") -> dict[str, Any]:
    """The columns of a row beside `columns` and those that every format reads.

    Args:
      source: the column that `source_of` reads.
    """
    read = {*columns, "id", "idx", read_column(row, "image"), read_column(row, "video")}
    read |= {f"{medium}s" for medium in (IMAGE, VIDEO) if row.get(f"{medium}s") == []}
    if source_of(row, source) is not None:
        read.add(source)
    if row.get("id") is not None:
        read.remove("idx")
    return {name: value for name, value in row.items() if name not in read}


def read_rank(value: Any) -> int:
    """
    Raises:
      UnusableRow: the rank is no whole number from 1 on.
    """
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (number and math.isfinite(value) and value == int(value) and value >= 1):
        raise UnusableRow("bad_rank", f"rank {value!r} is no whole number from 1 on")
    return int(value)


def read_number(value: Any, name: str, reason: SkipReason = "bad_score") -> float:
    """
    Raises:
      UnusableRow: for `reason`, where the value is no finite number.
    """
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (number and math.isfinite(value)):
        raise UnusableRow(reason, f"{name} {value!r} is no finite number")
    return float(value)


_FLAGS = {
    True: "true yes y t 1 1.0 good better desirable chosen accepted positive like up 👍",
    False: "false no n f 0 0.0 -1 -1.0 bad worse undesirable rejected negative dislike down 👎",
}
FLAGS = {spelling: value for value, spellings in _FLAGS.items() for spelling in spellings.split()}
"""What a verdict may be written as, in small letters; "thumbs up" and "thumbs_up" are "up"."""


def read_flag(value: Any, name: str) -> bool:
    """True or false in any spelling of `FLAGS`, numbers too.

    Raises:
      UnusableRow: the value is neither.
    """
    if isinstance(value, bool):
        return value
    spelling = re.sub(r"^thumbs?[\s_-]*", "", str(value).strip().lower()).lstrip("+")
    found = FLAGS.get(spelling) if isinstance(value, str | int | float) else None
    if found is None:
        known = ", ".join(FLAGS)
        raise UnusableRow("bad_label", f"{name} {brief(value)} is none of {known}")
    return found


def read_text(value: Any, name: str) -> str:
    """
    Raises:
      UnusableRow: the value is no text, or no valid one.
    """
    if not isinstance(value, str):
        raise UnusableRow("bad_message", f"{name} {brief(value)} is no text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UnusableRow("bad_text", f"{name}: {error}") from error
    return value


def read_list(value: Any, name: str, count: int, reason: SkipReason) -> Sequence[Any]:
    """
    Raises:
      UnusableRow: for `reason`, where the value is no list of `count` entries.
    """
    if not isinstance(value, list) or len(value) != count:
        size = (
            f"{len(value)} entries" if isinstance(value, list) else f"type {type(value).__name__}"
        )
        raise UnusableRow(reason, f"{name} has {size}, there are {count} responses")
    return value


def source_of(row: Row, column: str = "source") -> str | None:
    """What the column says of where a row comes from; None where it is no text."""
    value = row.get(column)
    return value if isinstance(value, str) else None
