"""Turn one row of a data file into a `Record`.

A row is a JSON object or a Parquet row with

* images: ``images`` (a list) or ``image`` (one): a path relative to the image folder, encoded
  bytes, or ``{"bytes": ..., "path": ...}`` as `datasets` stores them;
* videos: ``videos`` (a list) or ``video`` (one): the list of its frames, each given as an image
  is, or ``{"frames": [...], "fps": ...}`` where their rate is known; video files are not decoded;
* the prompt: ``prompt`` or ``question``, text or messages;
* the responses: ``chosen`` and ``rejected``, or ``responses`` with any number of them, each text
  or messages; none of these in a row whose responses are still to be generated. ``finished``
  beside ``responses``, as `mmpo generate` writes it, says which of them end by themselves;
* what rewards compare sampled responses with: ``answer`` or ``solution``, of any kind;
* or, for supervised data, ``messages``; with ``rejected_response`` it is a preference (ms-swift);
* a name: ``id`` or ``idx``, else the row number.

Messages follow TRL's format: content is text or a list of text, image and video parts. Images,
then videos stand before the text of the first user turn, which is where TRL puts them when nothing
is said; parts, and ``<image>`` and ``<video>`` in a text, may say it again, and then there must be
as many as images and videos.
"""

import math
import os
import re
from collections.abc import Mapping
from typing import Any, Literal, cast

from etils import epath

from mmpo_jax.data.images import resolve_image
from mmpo_jax.data.records import ImageRef, Record, Response, Role, Turn, VideoRef
from mmpo_jax.errors import DataError

SkipReason = Literal[
    "bad_id",  # neither a text nor a whole number
    "bad_image_entry",  # neither a path nor bytes
    "bad_json",  # the line is no JSON object
    "bad_message",  # a message without a known role or with unknown content
    "bad_text",  # text that is no valid Unicode
    "bad_video_entry",  # no list of frames of one size, or a rate that is no positive number
    "empty_prompt",  # a user turn that says nothing and shows nothing
    "empty_response",
    "dialogues_differ",  # responses that do not go on from one rendered prompt
    "image_broken",  # empty, truncated, not an image, too large, too narrow
    "image_count",  # the prompt all responses share does not hold every image
    "image_missing",
    "image_outside_folder",
    "image_position",  # an image or video anywhere but around the text of the first user turn
    "incomplete_pair",  # chosen without rejected, or the other way round
    "own_images",  # of a response: not taken where the row is used
    "own_prompt",  # the same of the prompt
    "no_answer",  # nothing that the rewards could compare responses with
    "no_label",  # a response without a verdict, where they are learned from
    "no_reference",  # a response without a reference's log-prob, where the data are to give it
    "no_score",  # a response without a score, where they are learned from
    "no_prompt",  # neither a prompt nor messages
    "placeholder_count",  # as many placeholders as images, or none
    "prompt_too_long",  # over the largest bucket; its image tokens are never cut
    "question_too_long",
    "template_refuses",  # the chat template does not take such a dialogue
    "turn_order",  # turns that do not alternate between user and assistant
    "unsupported_column",  # a column that changes what the row means
    "unsupported_image",  # the model takes none
    "unsupported_video",  # the model, or an alignment's labeler, takes no videos
]
MessagesAs = Literal["last_turn", "dialogue"]

Medium = Literal["image", "video"]
IMAGE: Medium = "image"
VIDEO: Medium = "video"
PLACEHOLDERS = {"<image>": IMAGE, "<video>": VIDEO}
"""What stands in a text for a medium."""


class UnusableRow(Exception):
    """The row has to be left out; caught by the readers and never seen by their callers."""

    def __init__(self, reason: SkipReason, detail: str):
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


# A turn and the media that stand in it, in order.
_ParsedTurn = tuple[Turn, tuple[Medium, ...]]
_Turns = tuple[_ParsedTurn, ...]


def row_id(row: Mapping[str, Any], number: int) -> str:
    """The id of a row: its ``id``, else its ``idx``, else its `number` in the file.

    Raises:
      UnusableRow: the id is neither a text nor a whole number.
    """
    value = next((row[key] for key in ("id", "idx") if row.get(key) is not None), number)
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise UnusableRow("bad_id", f"id {value!r} is neither a text nor a whole number")
    return str(value)


def parse_row(
    row: Mapping[str, Any], id_: str, root: epath.Path, messages_as: MessagesAs
) -> Record:
    """The record in a row. A column that is null is absent: Parquet has all columns in all rows.

    Args:
      root: the folder of the images, which no path may leave.
      messages_as: what a ``messages`` row supervises, see `mmpo_jax.data.readers.iter_records`.

    Raises:
      UnusableRow: with the reason to leave the row out.
    """
    images = tuple(_image(entry, root) for entry in _entries(row, "image"))
    videos = tuple(_video(*entry, root) for entry in enumerate(_entries(row, "video"), start=1))
    media = (IMAGE,) * len(images) + (VIDEO,) * len(videos)
    prompt, responses = _prompt_and_responses(row, messages_as)
    ranked = row.get("chosen") is not None or row.get("rejected_response") is not None
    # Each response is checked with the prompt, as the model will see it.
    for response in responses:
        _check_response(prompt, response)
        _check_dialogue(prompt + response, media)
    if not responses:
        _check_dialogue(prompt, media)
    return Record(
        id=id_,
        images=images,
        prompt=tuple(turn for turn, _ in prompt),
        responses=tuple(
            Response(tuple(turn for turn, _ in turns), finished, place if ranked else None)
            for place, (turns, finished) in enumerate(
                zip(responses, _finished(row, len(responses)), strict=True), start=1
            )
        ),
        videos=videos,
        answer=row.get("answer") if row.get("answer") is not None else row.get("solution"),
    )


def _finished(row: Mapping[str, Any], count: int) -> list[bool]:
    """Of the row's responses; all of them where nothing is said."""
    flags = row.get("finished")
    if flags is None or row.get("responses") is None:
        return [True] * count
    if not isinstance(flags, list) or not all(isinstance(flag, bool) for flag in flags):
        raise UnusableRow("bad_message", f"finished {str(flags)[:80]} is no list of true and false")
    if len(flags) != count:
        raise UnusableRow("bad_message", f"finished has {len(flags)} entries, responses {count}")
    return flags


def _entries(row: Mapping[str, Any], medium: Medium) -> list[Any]:
    """What the row's column of several, else that of one, holds."""
    several = row.get(f"{medium}s")
    if several is not None:
        return several if isinstance(several, list) else [several]
    return [] if row.get(medium) is None else [row[medium]]


def _video(number: int, entry: Any, root: epath.Path) -> VideoRef:
    frames, fps = entry, None
    if isinstance(entry, dict):
        frames, fps = entry.get("frames"), entry.get("fps")
    if not isinstance(frames, list) or not frames:
        detail = f"{str(entry)[:80]!r} is no list of frames; video files are not decoded"
        raise UnusableRow("bad_video_entry", detail)
    if fps is not None:
        known = isinstance(fps, int | float) and not isinstance(fps, bool)
        if not (known and fps > 0 and math.isfinite(fps)):
            raise UnusableRow("bad_video_entry", f"fps {fps!r} is no positive number")
    found = tuple(_image(frame, root) for frame in frames)
    return VideoRef(f"video {number} (from {found[0].name} on)", found, fps)


def _image(entry: Any, root: epath.Path) -> ImageRef:
    fields = entry if isinstance(entry, dict) else {}
    data = entry if isinstance(entry, bytes) else fields.get("bytes")
    path = entry if isinstance(entry, str) else fields.get("path")
    if isinstance(data, bytes):
        name = path if isinstance(path, str) and path else "(bytes in the row)"
        if not data:
            raise UnusableRow("image_broken", f"image {name} is empty (0 bytes)")
        return ImageRef(name, data=data)
    if data is not None or not isinstance(path, str) or not path:
        raise UnusableRow("bad_image_entry", f"{str(entry)[:80]!r} is neither a path nor bytes")
    try:
        file = resolve_image(root, path)
    except DataError as error:
        raise UnusableRow("image_outside_folder", str(error)) from error
    if not _is_file(file):
        raise UnusableRow("image_missing", f"there is no file {path!r} in {os.fspath(root)}")
    return ImageRef(path, path=file)


def _is_file(path: epath.Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # Such as a name that is too long to be one.
        return False


def _prompt_and_responses(
    row: Mapping[str, Any], messages_as: MessagesAs
) -> tuple[_Turns, tuple[_Turns, ...]]:
    present = {key: value for key, value in row.items() if value is not None}
    if "rejected_images" in present:
        raise UnusableRow("unsupported_column", "rejected_images: pairs of images are not read")
    if ("chosen" in present) != ("rejected" in present):
        raise UnusableRow("incomplete_pair", "chosen and rejected belong together")
    prompt = _turns(present.get("prompt", present.get("question", [])), "user")
    if "chosen" in present:
        chosen, rejected = (_turns(present[key], "assistant") for key in ("chosen", "rejected"))
        if not prompt:
            return _split_common_prompt(chosen, rejected)
        return prompt, (chosen, rejected)
    if "responses" in present:
        if not isinstance(present["responses"], list):
            raise UnusableRow("bad_message", "responses is not a list")
        return prompt, tuple(_turns(response, "assistant") for response in present["responses"])
    if prompt:
        if prompt[-1][0].role != "user":
            raise UnusableRow("turn_order", "the prompt does not end with a user turn")
        return prompt, ()
    if "messages" not in present:
        columns = ", ".join(sorted(present)) or "none"
        raise UnusableRow("no_prompt", f"neither a prompt nor messages; columns: {columns}")
    return _supervised(present, messages_as)


def _supervised(
    row: Mapping[str, Any], messages_as: MessagesAs
) -> tuple[_Turns, tuple[_Turns, ...]]:
    turns = _turns(row["messages"], "user")
    rejected = row.get("rejected_response")
    if messages_as == "dialogue" and rejected is None:
        return (), (turns,)
    if not turns or turns[-1][0].role != "assistant":
        raise UnusableRow("empty_response", "messages do not end with an assistant turn")
    prompt, response = turns[:-1], turns[-1:]
    if rejected is None:
        return prompt, (response,)
    return prompt, (response, _turns(rejected, "assistant"))


def _split_common_prompt(chosen: _Turns, rejected: _Turns) -> tuple[_Turns, tuple[_Turns, ...]]:
    """TRL's implicit prompt: the turns, up to a user's, with which two conversations begin."""
    common = 0
    for place, (ours, theirs) in enumerate(zip(chosen[:-1], rejected[:-1], strict=False)):
        if ours != theirs:
            break
        if ours[0].role == "user":
            common = place + 1
    return chosen[:common], (chosen[common:], rejected[common:])


def _turns(value: Any, role_of_text: Role) -> _Turns:
    if isinstance(value, str):
        value = [{"role": role_of_text, "content": value}]
    if not isinstance(value, list):
        raise UnusableRow("bad_message", f"{type(value).__name__} is neither text nor messages")
    return tuple(_turn(message) for message in value)


def _turn(message: Any) -> _ParsedTurn:
    role = message.get("role") if isinstance(message, dict) else None
    if role not in ("system", "user", "assistant"):
        raise UnusableRow("bad_message", f"a message of role {role!r}")
    segments = _segments(message.get("content"))
    texts = [text for text, _ in segments]
    written = [place for place, text in enumerate(texts) if text is not None and text.strip()]
    if written and None in texts[written[0] : written[-1]]:
        raise UnusableRow("image_position", "an image or video between two texts")
    text = "".join(text for text in texts if text is not None)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UnusableRow("bad_text", str(error)) from error
    return Turn(cast(Role, role), text), tuple(m for _, m in segments if m is not None)


_Segment = tuple[str, None] | tuple[None, Medium]


def _segments(content: Any) -> list[_Segment]:
    """The texts and media of a message in order."""
    if isinstance(content, str):
        return _split_placeholders(content)
    if not isinstance(content, list):
        raise UnusableRow("bad_message", f"content of type {type(content).__name__}")
    segments: list[_Segment] = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind in ("image", "video"):
            segments.append((None, cast(Medium, kind)))
        elif kind == "text" and isinstance(part.get("text"), str):
            segments.extend(_split_placeholders(part["text"]))
        else:
            raise UnusableRow("bad_message", f"a content part of type {kind!r}")
    return segments


def _split_placeholders(text: str) -> list[_Segment]:
    pieces = re.split(f"({'|'.join(PLACEHOLDERS)})", text)
    if len(pieces) == 1:
        return [(text, None)]  # Verbatim; beside a placeholder, white space is only its separator.
    return [
        (None, PLACEHOLDERS[piece]) if piece in PLACEHOLDERS else (piece.strip(), None)
        for piece in pieces
    ]


def _check_response(prompt: _Turns, response: _Turns) -> None:
    if not prompt and (not response or response[0][0].role == "assistant"):
        raise UnusableRow("no_prompt", "a response without a prompt")
    if prompt and prompt[-1][0].role != "user":
        raise UnusableRow("turn_order", "the prompt does not end with a user turn")
    if not response or response[-1][0].role != "assistant":
        raise UnusableRow("empty_response", "a response does not end with an assistant turn")


def _check_dialogue(dialogue: _Turns, media: tuple[Medium, ...]) -> None:
    roles = [turn.role for turn, _ in dialogue]
    if "user" not in roles:
        raise UnusableRow("no_prompt", "no turn of a user")
    spoken = roles[1:] if roles[0] == "system" else roles
    if any(role != ("user", "assistant")[place % 2] for place, role in enumerate(spoken)):
        raise UnusableRow("turn_order", f"turns {', '.join(roles)} do not alternate from user on")
    first_user = roles.index("user")
    if any(found for place, (_, found) in enumerate(dialogue) if place != first_user):
        raise UnusableRow("image_position", "an image or video outside the first user turn")
    _, found = dialogue[first_user]
    for medium in PLACEHOLDERS.values():
        if found and found.count(medium) != media.count(medium):
            counts = f"{found.count(medium)} {medium} placeholders for {media.count(medium)}"
            raise UnusableRow("placeholder_count", f"{counts} {medium}s")
    if found and found != media:
        raise UnusableRow("image_position", "a video before an image")
    for place, (turn, _) in enumerate(dialogue):
        if turn.text.strip() or (place == first_user and media):
            continue
        if turn.role == "assistant":
            raise UnusableRow("empty_response", f"turn {place + 1} of the assistant is empty")
        if turn.role == "user":
            raise UnusableRow("empty_prompt", f"turn {place + 1} of the user is empty")
