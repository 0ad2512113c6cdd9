"""From records to rows: what every format's writer uses."""

import base64
import dataclasses
import itertools
import json
import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal

from etils import epath

from mmpo_jax.core.errors import MmpoError
from mmpo_jax.core.files import fingerprint_bytes, write_atomic
from mmpo_jax.data.formats.media import IN_THE_ROW
from mmpo_jax.data.formats.media_keys import said_of
from mmpo_jax.data.formats.tags import TAGS
from mmpo_jax.data.images import image_format, name_below
from mmpo_jax.data.records import (
    IMAGE,
    VIDEO,
    ImageRef,
    Medium,
    Record,
    Response,
    Turn,
    VideoRef,
    placed,
)
from mmpo_jax.data.videos import container_of

Embed = Literal["no", "bytes", "base64"]


class CannotHold(MmpoError):
    """A format has no place for fields of a record."""

    def __init__(self, *fields: str, detail: str = "the format has no place for it"):
        super().__init__(f"{','.join(fields)}: {detail}")
        self.fields = fields


def _record(**fields: Any) -> Callable[[Record], Record]:
    return lambda record: dataclasses.replace(record, **fields)


def _responses(**fields: Any) -> Callable[[Record], Record]:
    return lambda record: dataclasses.replace(
        record, responses=tuple(dataclasses.replace(r, **fields) for r in record.responses)
    )


def _videos(**fields: Any) -> Callable[[Record], Record]:
    return lambda record: dataclasses.replace(
        record, videos=tuple(dataclasses.replace(video, **fields) for video in record.videos)
    )


def _turns(change: Callable[[Turn], Turn | None]) -> Callable[[Record], Record]:
    """The change of records that a change of turns makes; None leaves a turn out."""

    def changed(turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
        return tuple(turn for turn in map(change, turns) if turn is not None)

    def strip(record: Record) -> Record:
        responses = (dataclasses.replace(r, turns=changed(r.turns)) for r in record.responses)
        return dataclasses.replace(
            record, prompt=changed(record.prompt), responses=tuple(responses)
        )

    return strip


STRIP: Mapping[str, Callable[[Record], Record]] = {
    "source": _record(source=None),
    "videos": _record(videos=()),
    "other_images": _record(other_images=None),
    "fps": _videos(fps=None),
    "seconds": _videos(seconds=None),
    "system": _turns(lambda turn: None if turn.role in ("system", "developer") else turn),
    "places": _turns(lambda turn: dataclasses.replace(turn, content=turn.text)),
    "message keys": _turns(lambda turn: dataclasses.replace(turn, keys={})),
    "learned": _turns(lambda turn: dataclasses.replace(turn, learned=True)),
    "template": _record(template={}),
    "extra": _record(extra={}),
    "finished": _responses(finished=True),
    "rank": _responses(rank=None),
    "scores": _responses(scores={}),
    "critique": _responses(critique=None),
    "spans": _responses(spans=()),
    "desirable": _responses(desirable=None),
    "response.images": _responses(images=None),
    "response.prompt": _responses(prompt=None),
    "log_prob": _responses(log_prob=None),
    "token_ids": _responses(token_ids=None),
}
"""Fields that not every format has -> the record without them."""


def fields_of(record: Record) -> frozenset[str]:
    """The fields of `STRIP` that say something in a record."""
    return frozenset(name for name, strip in STRIP.items() if strip(record) != record)


def without(record: Record, fields: Collection[str]) -> Record:
    """A record without some fields of `STRIP`."""
    for name in fields:
        record = STRIP[name](record)
    return record


@dataclasses.dataclass(frozen=True)
class Writer:
    """What stands in rows for images and videos, and where copies of their files go."""

    root: str
    """The folder that paths in rows are relative to."""
    copies: str
    """Folder below it, for images that are not."""
    embed: Embed = "no"
    """Whether rows hold images themselves, and how."""

    def image(self, image: ImageRef) -> Any:
        """What stands in a row for an image.

        Raises:
          DataError: it cannot be read.
          OSError: a copy could not be written.
        """
        if self.embed == "no":
            return place_image(image, self.root, self.copies)
        data = image.read()
        path = None if image.name == IN_THE_ROW else image.name
        if self.embed == "bytes":
            return {"bytes": data, "path": path}
        return {"base64": base64.b64encode(data).decode(), "path": path}

    def video(self, video: VideoRef, rate: bool = True) -> Any:
        """What stands in a row for a video: its frames, with their `rate` or as a mere list, or its
        file."""
        if video.file is not None:
            file = self.image(video.file)
            said = {name: value for name, value in said_of(video).items() if value is not None}
            return {"video": file, **said} if rate and said else file
        frames = [self.image(frame) for frame in video.frames]
        return {"frames": frames, **said_of(video)} if rate else frames

    def video_folder(self, video: VideoRef) -> str:
        """A folder with a video's frames, relative to `root`; a copy where they lie in none.

        Raises:
          CannotHold: rows are to hold images themselves.
        """
        if self.embed != "no":
            raise CannotHold("videos", detail="this format names a folder of frames; write JSONL")
        if video.file is not None:
            return place_image(video.file, self.root, self.copies)
        parents = {os.path.dirname(frame.path) for frame in video.frames if frame.path is not None}
        if len(parents) == 1 and all(frame.path is not None for frame in video.frames):
            (parent,) = parents
            name = name_below(self.root, parent)
            if name is not None and len(list(epath.Path(parent).iterdir())) == len(video.frames):
                return name
        folder = os.path.join(self.copies, video.fingerprint())
        for number, frame in enumerate(video.frames, start=1):
            file = os.path.join(folder, f"{number:06d}.{image_format(frame)}")
            write_atomic(file, frame.read())
        return os.path.relpath(folder, self.root)

    def media(self, record: Record, rates: bool = True) -> dict[str, Any]:
        """The columns of a record's images and videos, none where it has none."""
        row: dict[str, Any] = {}
        if record.images:
            row["images"] = [self.image(image) for image in record.images]
        if record.videos:
            row["videos"] = [self.video(video, rates) for video in record.videos]
        return row


def place_image(image: ImageRef, root: str, copies: str) -> str:
    """The path with which a row names an image, relative to `root`.

    What lies there stays where it is. Of other files and of bytes a copy is written to `copies`,
    named by content, so that each is there once: readers follow no path out of the folder.

    Raises:
      DataError: the image cannot be read.
      OSError: the copy could not be written.
    """
    name = None if image.path is None else name_below(root, image.path)
    if name is None:
        data = image.read()
        copy = epath.Path(copies) / f"{fingerprint_bytes(data)}.{_ending(image, data)}"
        if not copy.exists():
            write_atomic(copy, data)
        name = os.path.relpath(copy, root)
    return name


def _ending(file: ImageRef, data: bytes) -> str:
    return container_of(data) or image_format(file)


MESSAGES = frozenset({"system", "places", "message keys", "learned", "template"})
"""What formats of messages have a place for."""


def messages(
    turns: Sequence[Turn],
    record: Record,
    *,
    behind: Sequence[Turn] = (),
    tags: bool = False,
    front: bool = False,
    by_column: bool = False,
) -> list[dict[str, Any]]:
    """Turns as role and content, with the other keys of each message.

    Media are written as parts, or as tags in all turns of a record: a line break behind a tag means
    less than one behind a part, see `Turn.tagged`, and beside parts no tag is read.

    Args:
      turns: of the record.
      record: whose media stand in them.
      behind: the turns that they go on from, which are written elsewhere.
      tags: whether places of media are written as tags in texts, and not as parts.
      front: of tags, whether media whose places no turn has are written before the first user.
      by_column: whether they go to a file of columns, which gives every object the keys of all.

    Raises:
      CannotHold: a line break behind a part, where tags are written; or, for a file of columns, a
        key of a message that would not come back as it is.
    """
    kinds = {medium for medium, media in _media(record).items() if media}
    counts = len(record.images), len(record.videos)
    dialogues = _dialogues(record)
    if any(_breaks(placed(dialogue, *counts), tagged=True) for dialogue in dialogues):
        tags = front = True
    shown = [placed(dialogue, *counts) if front else dialogue for dialogue in dialogues]
    if tags and any(_breaks(dialogue, tagged=False) for dialogue in shown):
        detail = "a line break begins the text behind an image, and would be lost behind a tag"
        raise CannotHold("prompt", detail=detail)
    if front:
        turns = placed((*behind, *turns), *counts)[len(behind) :]
    in_parts = not tags and any(turn.media for dialogue in dialogues for turn in dialogue)
    literal = "" if in_parts else "|".join(TAGS[kind] for kind in kinds)
    written = []
    for turn in turns:
        said = _escaped(turn, literal) if literal and turn.role == "user" else turn
        as_text = tags or isinstance(turn.content, str)
        message = {"role": turn.role, "content": _text(said) if as_text else _parts(said)}
        message |= _keys_by_column(turn.keys) if by_column else turn.keys
        written.append(message if turn.learned else message | {"loss": False})
    return written


def _keys_by_column(keys: Mapping[str, Any]) -> dict[str, Any]:
    """The other keys of a message as a file of columns holds them: calls of tools, whose arguments
    are of any kind, as JSON text."""
    written = dict(keys)
    if "tool_calls" in written:
        written["tool_calls"] = json.dumps(written["tool_calls"], ensure_ascii=False)
    _check_columns(written, "message keys")
    return written


def _check_columns(values: Mapping[str, Any], field: str) -> None:
    for name, value in values.items():
        if _has_nothing(value):
            detail = f"{name} holds null or an empty object, which columns do not; write JSONL"
            raise CannotHold(field, detail=detail)


def _has_nothing(value: Any) -> bool:
    """Whether some object in a value is empty or has a key with null."""
    if isinstance(value, Mapping):
        return not value or any(one is None or _has_nothing(one) for one in value.values())
    return isinstance(value, list) and any(map(_has_nothing, value))


def _dialogues(record: Record) -> list[tuple[Turn, ...]]:
    """The turns that are read together: a prompt and a response, and the prompt by itself."""
    found = [record.prompt]
    for response in record.responses:
        prompt = record.prompt if response.prompt is None else response.prompt
        found.append((*prompt, *response.turns))
    return found


def _breaks(turns: Sequence[Turn], *, tagged: bool) -> bool:
    """Whether a line break is behind some medium in turns that are `tagged`, or that are not."""
    return any(
        isinstance(first, Medium) and isinstance(second, str) and second.startswith("\n")
        for turn in turns
        if turn.media and turn.tagged is tagged
        for first, second in itertools.pairwise(turn.content)
    )


def _media(record: Record) -> dict[Medium, Sequence[Any]]:
    return {IMAGE: record.images, VIDEO: record.videos}


def _parts(turn: Turn) -> list[dict[str, str]]:
    return [
        {"type": piece.value} if isinstance(piece, Medium) else {"type": "text", "text": piece}
        for piece in turn.content
    ]


def _text(turn: Turn) -> str:
    """A turn's text with tags for media."""
    if isinstance(turn.content, str):
        return turn.content
    return "".join(TAGS[one] if isinstance(one, Medium) else one for one in turn.content)


def _escaped(turn: Turn, literal: str) -> Turn:
    """A turn with a backslash before what only looks like one of the tags `literal`."""

    def escaped(text: str) -> str:
        return re.sub(f"({literal})", r"\\\1", text)

    if isinstance(turn.content, str):
        return dataclasses.replace(turn, content=escaped(turn.content))
    pieces = tuple(one if isinstance(one, Medium) else escaped(one) for one in turn.content)
    return dataclasses.replace(turn, content=pieces)


def template_columns(record: Record, *, as_text: bool = False) -> dict[str, Any]:
    """The columns of a record's arguments of the chat template, as `template_arguments` reads them.

    Args:
      record: with the arguments.
      as_text: as JSON text; columns of Parquet give every object the keys of all.
    """
    lists = {
        name: value
        for name, value in record.template.items()
        if name in ("tools", "documents") and isinstance(value, list) and value
    }
    others = {name: value for name, value in record.template.items() if name not in lists}
    columns: dict[str, Any] = {**lists, "chat_template_kwargs": others} if others else lists
    if not as_text:
        return columns
    return {name: json.dumps(value, ensure_ascii=False) for name, value in columns.items()}


def with_extra(row: dict[str, Any], extra: Mapping[str, Any], writer: Writer) -> dict[str, Any]:
    """A row with columns that mean nothing to us.

    Raises:
      CannotHold: one has the name of a column that does; or, for a file of columns, would not come
        back as it is.
    """
    if writer.embed == "bytes":
        _check_columns(extra, "extra")
    taken = ", ".join(sorted({*row, "id"} & extra.keys()))
    if taken:
        raise CannotHold("extra", detail=f"{taken}: the column means something else here")
    return {**row, **extra}


def chosen_and_rejected(record: Record) -> tuple[Response, Response]:
    """The two responses of a pair, the better one first.

    Raises:
      CannotHold: it is no pair.
    """
    if not record.ranked or len(record.responses) != 2:
        detail = f"{len(record.responses)} responses; a row holds a chosen and a rejected one"
        raise CannotHold("responses", detail=detail)
    first, second = record.responses
    assert first.rank is not None and second.rank is not None
    if first.rank == second.rank:
        raise CannotHold("rank", detail="a tie; a row holds a chosen and a rejected response")
    return (first, second) if first.rank < second.rank else (second, first)


def question_of(record: Record) -> str:
    """The text of a prompt that is one question, with what only looks like a tag escaped.

    Raises:
      CannotHold: the prompt has other turns.
    """
    if [turn.role for turn in record.prompt] != ["user"]:
        raise CannotHold("prompt", detail=f"{len(record.prompt)} turns; a row holds one question")
    literal = "|".join(TAGS[medium] for medium, media in _media(record).items() if media)
    (asked,) = record.prompt
    return (_escaped(asked, literal) if literal else asked).text


def answer_of(response: Response) -> str:
    """The text of a response that is one answer.

    Raises:
      CannotHold: it has other turns.
    """
    if [turn.role for turn in response.turns] != ["assistant"]:
        raise CannotHold("responses", detail=f"{len(response.turns)} turns; a row holds one answer")
    return response.text
