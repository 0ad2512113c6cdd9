"""Messages and texts as turns, and what dialogues must be like.

Messages follow TRL's format: content is text or a list of text, image and video parts. Images,
then videos stand before the text of the first user turn, which is where TRL puts them when nothing
is said; parts, and ``<image>`` and ``<video>`` in a text, may say it again, and then there must be
as many as images and videos.
"""

import re
from typing import Any, Literal, cast

from mmpo_jax.data.records import Role, Turn
from mmpo_jax.data.rows import UnusableRow

Medium = Literal["image", "video"]
IMAGE: Medium = "image"
VIDEO: Medium = "video"
PLACEHOLDERS = {"<image>": IMAGE, "<video>": VIDEO}
"""What stands in a text for a medium."""

ParsedTurn = tuple[Turn, tuple[Medium, ...]]
"""A turn and the media that stand in it, in order."""
Turns = tuple[ParsedTurn, ...]


def parse_turns(value: Any, role_of_text: Role) -> Turns:
    """A text, which is one turn, or messages with role and content.

    Raises:
      UnusableRow: it is neither.
    """
    if isinstance(value, str):
        value = [{"role": role_of_text, "content": value}]
    if not isinstance(value, list):
        raise UnusableRow("bad_message", f"{type(value).__name__} is neither text nor messages")
    return tuple(parse_turn(message) for message in value)


def parse_turn(message: Any) -> ParsedTurn:
    """One message.

    Raises:
      UnusableRow: its role or content is unknown, or a medium stands between two texts.
    """
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


def split_last_answer(turns: Turns) -> tuple[Turns, Turns]:
    """A dialogue's turns up to its last answer, and that answer.

    Raises:
      UnusableRow: it does not end with one.
    """
    if not turns or turns[-1][0].role != "assistant":
        raise UnusableRow("empty_response", "messages do not end with an assistant turn")
    return turns[:-1], turns[-1:]


def split_common_prompt(chosen: Turns, rejected: Turns) -> tuple[Turns, Turns, Turns]:
    """TRL's implicit prompt: the turns, up to a user's, with which two conversations begin.

    Returns:
      (prompt, rest of the chosen conversation, rest of the rejected one).
    """
    common = 0
    for place, (ours, theirs) in enumerate(zip(chosen[:-1], rejected[:-1], strict=False)):
        if ours != theirs:
            break
        if ours[0].role == "user":
            common = place + 1
    return chosen[:common], chosen[common:], rejected[common:]


def check_prompt(prompt: Turns) -> None:
    """
    Raises:
      UnusableRow: nobody asks anything in the prompt of a row without responses.
    """
    if prompt and prompt[-1][0].role != "user":
        raise UnusableRow("turn_order", "the prompt does not end with a user turn")


def check_response(prompt: Turns, response: Turns) -> None:
    """
    Raises:
      UnusableRow: the turns are no response to the prompt.
    """
    if not prompt and (not response or response[0][0].role == "assistant"):
        raise UnusableRow("no_prompt", "a response without a prompt")
    if prompt and prompt[-1][0].role != "user":
        raise UnusableRow("turn_order", "the prompt does not end with a user turn")
    if not response or response[-1][0].role != "assistant":
        raise UnusableRow("empty_response", "a response does not end with an assistant turn")


def check_dialogue(dialogue: Turns, media: tuple[Medium, ...]) -> None:
    """
    Raises:
      UnusableRow: speakers do not take turns, somebody says nothing, or media are misplaced.
    """
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
