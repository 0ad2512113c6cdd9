"""From records to rows: what every format's writer uses."""

import base64
import dataclasses
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal

from etils import epath

from mmpo_jax.data.formats.media import IN_THE_ROW
from mmpo_jax.data.images import image_format, name_below
from mmpo_jax.data.records import ImageRef, Record, Response, Turn, VideoRef
from mmpo_jax.errors import MmpoError
from mmpo_jax.files import fingerprint_bytes, write_atomic

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


def _without_fps(record: Record) -> Record:
    videos = tuple(dataclasses.replace(video, fps=None) for video in record.videos)
    return dataclasses.replace(record, videos=videos)


def _without_system(record: Record) -> Record:
    def spoken(turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
        return tuple(turn for turn in turns if turn.role != "system")

    responses = (dataclasses.replace(r, turns=spoken(r.turns)) for r in record.responses)
    return dataclasses.replace(record, prompt=spoken(record.prompt), responses=tuple(responses))


STRIP: Mapping[str, Callable[[Record], Record]] = {
    "source": _record(source=None),
    "videos": _record(videos=()),
    "other_images": _record(other_images=None),
    "fps": _without_fps,
    "system": _without_system,
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
}
"""Fields that not every format has -> the record without them."""


def fields_of(record: Record) -> frozenset[str]:
    """Those of `STRIP` that say something in a record."""
    return frozenset(name for name, strip in STRIP.items() if strip(record) != record)


def without(record: Record, fields: Collection[str]) -> Record:
    """A record without some fields of `STRIP`."""
    for name in fields:
        record = STRIP[name](record)
    return record


@dataclasses.dataclass(frozen=True)
class Writer:
    """Where the rows' images go.

    Attributes:
      root: the folder that paths in rows are relative to.
      copies: folder below it, for images that are not.
      embed: whether rows hold images themselves, and how.
    """

    root: str
    copies: str
    embed: Embed = "no"

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
        """What stands in a row for a video: its frames, with their `rate` or as a mere list."""
        frames = [self.image(frame) for frame in video.frames]
        return {"frames": frames, "fps": video.fps} if rate else frames

    def video_folder(self, video: VideoRef) -> str:
        """A folder with a video's frames, relative to `root`; a copy where they lie in none.

        Raises:
          CannotHold: rows are to hold images themselves.
        """
        if self.embed != "no":
            raise CannotHold("videos", detail="this format names a folder of frames; write JSONL")
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
        copy = epath.Path(copies) / f"{fingerprint_bytes(data)}.{image_format(image)}"
        if not copy.exists():
            write_atomic(copy, data)
        name = os.path.relpath(copy, root)
    return name


def messages(turns: Sequence[Turn], tags: str = "") -> list[dict[str, str]]:
    """Turns as role and content; `tags` stand before the text of the first user."""
    written = []
    for turn in turns:
        text = turn.text
        if tags and turn.role == "user":
            text, tags = tags + text, ""
        written.append({"role": turn.role, "content": text})
    return written


def with_extra(row: dict[str, Any], extra: Mapping[str, Any]) -> dict[str, Any]:
    """A row with columns that mean nothing to us.

    Raises:
      CannotHold: one has the name of a column that does.
    """
    taken = ", ".join(sorted({*row, "id"} & extra.keys()))
    if taken:
        raise CannotHold("extra", detail=f"{taken}: the column means something else here")
    return {**row, **extra}


def image_tags(record: Record) -> str:
    """``<image>`` and ``<video>`` for everything a record shows."""
    return "<image>" * len(record.images) + "<video>" * len(record.videos)


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
    """The text of a prompt that is one question.

    Raises:
      CannotHold: the prompt has other turns.
    """
    if [turn.role for turn in record.prompt] != ["user"]:
        raise CannotHold("prompt", detail=f"{len(record.prompt)} turns; a row holds one question")
    return record.prompt[0].text


def answer_of(response: Response) -> str:
    """The text of a response that is one answer.

    Raises:
      CannotHold: it has other turns.
    """
    if [turn.role for turn in response.turns] != ["assistant"]:
        raise CannotHold("responses", detail=f"{len(response.turns)} turns; a row holds one answer")
    return response.text
