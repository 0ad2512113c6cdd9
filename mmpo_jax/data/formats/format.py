"""What a format is: how its rows become records, and records its rows."""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from mmpo_jax.data.formats.entries import read_column
from mmpo_jax.data.formats.media import MediaFolder
from mmpo_jax.data.formats.media_keys import READ
from mmpo_jax.data.formats.places import Placed, place_media
from mmpo_jax.data.formats.turns import (
    ARGUMENTS,
    Turns,
    check_dialogue,
    check_prompt,
    template_arguments,
)
from mmpo_jax.data.formats.writing import Writer
from mmpo_jax.data.ids import ID_COLUMNS
from mmpo_jax.data.records import ImageRef, Record, Response, Turn, VideoRef
from mmpo_jax.data.rows import MessagesAs, Row, brief
from mmpo_jax.data.skipped import SkipReason, UnusableRow


@dataclasses.dataclass(frozen=True)
class DraftResponse:
    """A response as a row gives it."""

    turns: Turns
    prompt: Turns | None = None
    """Prompt of its own, in place of the row's."""
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Fields of `Response`, beside turns and prompt."""
    problem: UnusableRow | None = None
    """The reason for which it alone cannot be used."""


@dataclasses.dataclass(frozen=True)
class Draft:
    """What a row says, not checked yet."""

    prompt: Turns
    responses: tuple[DraftResponse, ...]
    images: tuple[ImageRef, ...] = ()
    videos: tuple[VideoRef, ...] = ()
    other_images: tuple[ImageRef, ...] | None = None
    source: str | None = None
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Columns that the record has no place for."""
    template: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Arguments of the chat template."""
    samples: bool = False
    """Whether the responses were sampled, where an empty one is a response."""


@dataclasses.dataclass(frozen=True)
class Format:
    """A convention for rows."""

    name: str
    claims: Callable[[Row], bool]
    """row -> whether its columns are this format's."""
    read: Callable[[Row, MediaFolder, MessagesAs], Draft]
    """(row, its media, messages_as) -> what the row says; raises `UnusableRow`."""
    write: Callable[[Record, Writer], dict[str, Any]]
    """(record, writer) -> a row, of a record whose fields it can hold; raises `CannotHold`."""
    holds: frozenset[str]
    """Names of `writing.STRIP` that its rows have a place for."""
    ids: tuple[str, ...] = ID_COLUMNS
    """Columns with a row's id, the first that has one."""


def finish(draft: Draft, id_: str, number: int, folder: MediaFolder) -> Record:
    """The record of a draft.

    Of several responses one that cannot be used is left out alone.

    Args:
      number: of the row.
      folder: finds the media that messages name.

    Raises:
      UnusableRow: something in it cannot be meant, or too few responses are left.
    """
    if not draft.responses:
        check_prompt(draft.prompt)
        check_dialogue(draft.prompt)
        shown = place_media(draft.prompt, draft.images, draft.videos, folder)
        return _record(draft, shown, shown.turns, (), id_, number, ())
    finished: list[tuple[Placed, int, Response]] = []
    left_out = []
    for place, response in enumerate(draft.responses):
        try:
            finished.append(_finished(draft, response, folder))
        except UnusableRow as problem:
            left_out.append((place, problem))
    ranked = any("rank" in response.fields for response in draft.responses)
    if len(finished) < (2 if ranked and len(draft.responses) > 1 else 1):
        place, error = left_out[0]
        if len(draft.responses) == 1:
            raise error
        raise UnusableRow(error.reason, f"response {place + 1}: {error.detail}") from error
    given = [response.rank is not None for *_, response in finished]
    if any(given) and not all(given):
        raise UnusableRow("rank_count", f"{sum(given)} of {len(given)} responses have a rank")
    shown, prompt = _shared(draft, finished, folder)
    responses = tuple(_own(*one, shown, prompt) for one in finished)
    told = tuple((place, error.reason, error.detail) for place, error in left_out)
    return _record(draft, shown, prompt, responses, id_, number, told)


def _finished(
    draft: Draft, draft_response: DraftResponse, folder: MediaFolder
) -> tuple[Placed, int, Response]:
    """A response checked with its prompt, as the model will see it, and where it begins."""
    if draft_response.problem is not None:
        raise draft_response.problem
    prompt = draft.prompt if draft_response.prompt is None else draft_response.prompt
    dialogue = prompt + draft_response.turns
    if not draft_response.turns or draft_response.turns[-1].role != "assistant":
        raise UnusableRow("empty_response", "a response does not end with an assistant turn")
    if prompt:
        check_prompt(prompt)
    check_dialogue(dialogue, draft.samples)
    images = draft_response.fields.get("images", draft.images)
    shown = place_media(dialogue, images, draft.videos, folder)
    placed_others = any(turn.media for turn in shown.turns) and draft.other_images is not None
    if placed_others and len(draft.other_images or ()) != len(shown.images):
        count = len(draft.other_images or ())
        detail = f"{count} other images for {len(shown.images)} places of images"
        raise UnusableRow("placeholder_count", detail)
    fields = {name: value for name, value in draft_response.fields.items() if name != "images"}
    response = Response(shown.turns[len(prompt) :], **fields)
    for span in response.spans:
        if not 0 <= span.start < span.end <= len(response.text):
            detail = f"characters {span.start} to {span.end} of {len(response.text)}"
            raise UnusableRow("bad_span", detail)
    own = draft_response.prompt is not None, "images" in draft_response.fields
    # Which of them are its own even where they say the same is up to the format.
    response = dataclasses.replace(
        response,
        prompt=shown.turns[: len(prompt)] if own[0] else None,
        images=shown.images if own[1] else None,
    )
    return shown, len(prompt), response


def _shared(
    draft: Draft, finished: Sequence[tuple[Placed, int, Response]], folder: MediaFolder
) -> tuple[Placed, tuple[Turn, ...]]:
    """(the row's media in place, its prompt): as the first response has them that has no others."""
    for shown, cut, response in finished:
        if response.prompt is None and response.images is None:
            return shown, shown.turns[:cut]
    shown = place_media(draft.prompt, draft.images, draft.videos, folder)
    return shown, shown.turns


def _own(
    shown: Placed, cut: int, response: Response, first: Placed, prompt: tuple[Turn, ...]
) -> Response:
    """A response with a prompt and images of its own where the first one's are others."""
    if response.prompt is None and shown.turns[:cut] != prompt:
        response = dataclasses.replace(response, prompt=shown.turns[:cut])
    if response.images is None and shown.images != first.images:
        response = dataclasses.replace(response, images=shown.images)
    if shown.videos != first.videos:
        raise UnusableRow("own_videos", "the responses show different videos")
    return response


def _record(
    draft: Draft,
    shown: Placed,
    prompt: tuple[Turn, ...],
    responses: tuple[Response, ...],
    id_: str,
    number: int,
    left_out: tuple[tuple[int, SkipReason, str], ...],
) -> Record:
    return Record(
        id=id_,
        images=shown.images,
        prompt=prompt,
        responses=responses,
        videos=shown.videos,
        other_images=draft.other_images,
        source=draft.source,
        row=number,
        extra=draft.extra,
        template=draft.template,
        left_out=left_out,
    )


def draft_of(
    row: Row,
    media: MediaFolder,
    prompt: Turns,
    responses: tuple[DraftResponse, ...],
    used: Iterable[str],
    samples: bool = False,
) -> Draft:
    """What a row says beside its media, source and template's arguments, in the columns that most
    formats have these in.

    Args:
      used: the columns that prompt and responses come from.
      samples: see `Draft`.

    Raises:
      UnusableRow: those columns say something else.
    """
    return Draft(
        prompt=prompt,
        responses=responses,
        images=media.images(row),
        videos=media.videos(row),
        source=source_of(row),
        extra=rest(row, *used, *ARGUMENTS),
        template=template_arguments(row),
        samples=samples,
    )


def rest(row: Row, *columns: str, source: str = "source") -> dict[str, Any]:
    """The columns of a row beside `columns` and those that every format reads.

    Args:
      source: the column that `source_of` reads.
    """
    read = {*columns, "id", "idx", read_column(row, "image"), read_column(row, "video")}
    read |= {f"{medium}s" for medium in ("image", "video") if row.get(f"{medium}s") == []}
    if read_column(row, "video") is not None:
        read.update(READ)
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
