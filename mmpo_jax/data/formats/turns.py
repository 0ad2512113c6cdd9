"""Messages and texts as a row has them, and what dialogues must be like.

A message is ``{"role": ..., "content": ...}`` or ``{"from": ..., "value": ...}``. Content is a text
or a list of text, image and video parts; a part may name its picture, and so may the keys
``image``, ``images``, ``video`` and ``videos`` of a message. Its other keys are the chat
template's, but for those that say whether it is learned. Where media stand is settled in
`formats.places`, once a row's media are known.
"""

import dataclasses
import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from mmpo_jax.data.formats.entries import PART_KINDS, entries, same_part
from mmpo_jax.data.formats.media_keys import READ
from mmpo_jax.data.formats.tags import count_tags, split_tags
from mmpo_jax.data.records import IMAGE, VIDEO, Medium, Role
from mmpo_jax.data.skipped import UnusableRow

ROLES: Mapping[str, Role] = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "chatbot": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "tool_response": "tool",
}
"""What rows call the speakers."""
LEARNED = ("loss", "weight", "train", "training", "trainable", "learn")
"""Keys of a message that say whether it is learned: true or 1, false or 0."""
SPEAKING = (
    *("tool_calls", "function_call", "tool_responses"),
    *("reasoning_content", "reasoning", "thinking"),
)
"""Keys of a message that say something beside its content."""
KINDS: Mapping[str, Medium] = {name: Medium(kind) for name, kind in PART_KINDS.items()}
"""Types of content parts that show something."""


@dataclasses.dataclass(frozen=True)
class MediaPart:
    """A part of a message that shows something."""

    medium: Medium
    part: Mapping[str, Any] | None = dataclasses.field(default=None, hash=False)
    """Entry of the part, where it names what it shows; None for the next of the row's columns."""
    keyed: bool = dataclasses.field(default=False, compare=False)
    """Whether a key of the message names it, and no part of its content stands for it."""


@dataclasses.dataclass(frozen=True)
class Message:
    """A message before the places of media in its texts are known; see `records.Turn`."""

    role: Role
    content: str | tuple[str | MediaPart, ...]
    keys: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)
    learned: bool = True
    tagged: bool = dataclasses.field(default=False, compare=False)

    @property
    def pieces(self) -> tuple[str | MediaPart, ...]:
        """The content as a list of parts."""
        return (self.content,) if isinstance(self.content, str) else self.content

    @property
    def parts(self) -> tuple[MediaPart, ...]:
        """The parts that show something."""
        return tuple(piece for piece in self.pieces if isinstance(piece, MediaPart))

    @property
    def text(self) -> str:
        """The texts without the media."""
        return "".join(piece for piece in self.pieces if isinstance(piece, str))

    @property
    def is_empty(self) -> bool:
        """Whether it says and shows nothing and calls no tool."""
        speaks = any(self.keys.get(name) for name in SPEAKING)
        return not (self.text.strip() or self.parts or speaks)


Turns = tuple[Message, ...]


def parse_turns(value: Any, role_of_text: Role) -> Turns:
    """A text, which is one turn, or messages: a list, a single one, or lists by column.

    Raises:
      UnusableRow: it is none of these.
    """
    if isinstance(value, str):
        value = [{"role": role_of_text, "content": value}]
    elif isinstance(value, Mapping):
        value = _rows_of_columns(value)
    if not isinstance(value, Sequence) or isinstance(value, bytes):
        raise UnusableRow("bad_message", f"{type(value).__name__} is neither text nor messages")
    return tuple(parse_turn(message) for message in value)


def _rows_of_columns(value: Mapping[str, Any]) -> list[Any]:
    """Messages by column, ``{"role": [...], "content": [...]}``; one message is a list of one."""
    roles = value.get("role", value.get("from"))
    if not isinstance(roles, list):
        return [value]
    columns = {name: column for name, column in value.items() if isinstance(column, list)}
    if any(len(column) != len(roles) for column in columns.values()):
        raise UnusableRow("bad_message", "messages by column, of different lengths")
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def parse_turn(message: Any) -> Message:
    """One message.

    Raises:
      UnusableRow: its role or content is unknown.
    """
    if not isinstance(message, Mapping):
        raise UnusableRow("bad_message", f"{str(message)[:80]!r} is no message with a role")
    given = {name: value for name, value in message.items() if value is not None}
    speaker = given.pop("role", None) or given.pop("from", None)
    role = ROLES.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        raise UnusableRow("bad_message", f"a message of role {str(speaker)[:80]!r}")
    content = given.pop("content", None)
    if content is None:
        content = given.pop("value", None)
    flags = [given.pop(name) for name in LEARNED if name in given]
    if speaker == "function_call":
        content, given["tool_calls"] = "", _calls(content)
    if isinstance(given.get("tool_calls"), str):
        calls = _from_json(given.pop("tool_calls"), "tool_calls")
        given |= {} if calls is None else {"tool_calls": calls}
    shown = _shown_by_keys(given)
    if content is None and (given or shown):
        content = ""  # a mere call of tools, or a picture
    said, learned = _pieces(content), all(map(_is_learned, flags))
    if not shown:
        return Message(role, said, given, learned)
    pieces, tagged = _with_shown(said, shown)
    return Message(role, pieces, given, learned, tagged)


def _shown_by_keys(given: dict[str, Any]) -> list[MediaPart]:
    """The media under keys of a message that are called as the columns of a row are; the keys go.
    An empty text says nothing there, as a file of columns may have one in every message.

    Returns:
      Images, then videos.
    """
    found = []
    for medium, name in (IMAGE, "image"), (VIDEO, "video"):
        said = {key: given[key] for key in (name, f"{name}s") if given.get(key, "") != ""}
        if medium is VIDEO and said:
            said |= {key: given.pop(key) for key in READ if key in given}
        named = entries(said, medium.value)
        found += [MediaPart(medium, {"type": name, name: entry}, keyed=True) for entry in named]
        for key in (name, f"{name}s"):
            given.pop(key, None)
    return found


def _with_shown(
    said: str | tuple[str | MediaPart, ...], shown: Sequence[MediaPart]
) -> tuple[tuple[str | MediaPart, ...], bool]:
    """(content, whether tags say the places) of a message with the media of its keys: in place of
    its parts that name nothing, else of its tags, else in front. Where all its parts of a kind name
    media, the keys say these again.

    Raises:
      UnusableRow: there are more or fewer places of a kind than media, or other media there.
    """
    pieces: list[str | MediaPart] = [said] if isinstance(said, str) else list(said)
    shown = [part for part in shown if not _says_again(pieces, shown, part.medium)]
    kinds = {part.medium for part in shown}
    waits = any(isinstance(piece, MediaPart) and piece.part is None for piece in pieces)
    texts = [piece for piece in pieces if isinstance(piece, str)]
    tagged = not waits and any(count_tags(text, kind) for text in texts for kind in kinds)
    if not waits:
        pieces = [one for piece in pieces for one in _split(piece, kinds)]
    if not waits and not tagged:
        return (*shown, *(piece for piece in pieces if piece != "")), False
    for kind in kinds:
        left = [part for part in shown if part.medium is kind]
        places = [
            place
            for place, piece in enumerate(pieces)
            if isinstance(piece, MediaPart) and piece == MediaPart(kind)
        ]
        if len(places) != len(left):
            detail = f"{len(places)} places for {len(left)} {kind.value}s of a message"
            raise UnusableRow("placeholder_count", detail)
        for place, part in zip(places, left, strict=True):
            pieces[place] = part if tagged else dataclasses.replace(part, keyed=False)
    return tuple(pieces), tagged


def _says_again(
    pieces: Sequence[str | MediaPart], shown: Sequence[MediaPart], kind: Medium
) -> bool:
    """Whether the keys of a message name the media of a kind that its parts name.

    Raises:
      UnusableRow: all parts of that kind name media, and the keys others.
    """
    named = [one.part for one in pieces if isinstance(one, MediaPart) and one.medium is kind]
    if not named or None in named:
        return False
    given = [part.part for part in shown if part.medium is kind]
    if len(named) != len(given) or not all(map(same_part, named, given)):
        detail = f"the parts of a message name other {kind.value}s than its keys"
        raise UnusableRow("placeholder_count", detail)
    return True


def _split(piece: str | MediaPart, kinds: Collection[Medium]) -> list[str | MediaPart]:
    if isinstance(piece, MediaPart):
        return [piece]
    found = split_tags(piece, kinds)
    return [MediaPart(one) if isinstance(one, Medium) else one for one in found]


def _is_learned(value: Any) -> bool:
    if value not in (True, False, 0, 1):
        raise UnusableRow("bad_message", f"a message of weight {str(value)[:80]!r}, not 0 or 1")
    return bool(value)


def _calls(content: Any) -> list[dict[str, Any]]:
    """LLaMA-Factory's calls, JSON text of a name and arguments, as a template reads them."""
    try:
        calls = json.loads(content) if isinstance(content, str) else content
        calls = calls if isinstance(calls, list) else [calls]
        return [{"type": "function", "function": {**call}} for call in calls]
    except (ValueError, TypeError) as error:
        raise UnusableRow("bad_message", f"a function_call that is no JSON: {error}") from error


def _from_json(text: str, name: str) -> Any:
    """What a text of JSON says; None where it is blank."""
    try:
        return json.loads(text) if text.strip() else None
    except ValueError as error:
        raise UnusableRow("bad_message", f"{name} that are no JSON: {error}") from error


def _pieces(content: Any) -> str | tuple[str | MediaPart, ...]:
    """The texts and media of a message in order."""
    if isinstance(content, str):
        return _valid(content)
    if isinstance(content, Mapping):
        content = [content]
    if not isinstance(content, Sequence) or isinstance(content, bytes):
        raise UnusableRow("bad_message", f"content of type {type(content).__name__}")
    return tuple(map(_piece, content))


def _piece(part: Any) -> str | MediaPart:
    if isinstance(part, str):
        return _valid(part)
    given = part if isinstance(part, Mapping) else {}
    given = {name: value for name, value in given.items() if value is not None}
    kind = given.get("type")
    if kind is None:
        kind = next((name for name in ("text", *KINDS) if name in given), None)
    if kind in ("text", "input_text") and isinstance(given.get("text"), str):
        return _valid(given["text"])
    if isinstance(kind, str) and kind in KINDS:
        # Columns of Parquet give every part the keys of all: an empty text says nothing.
        names = any(value for name, value in given.items() if name not in ("type", "text"))
        return MediaPart(KINDS[kind], given if names else None)
    raise UnusableRow("bad_message", f"a content part of type {str(kind)[:80]!r}")


def _valid(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UnusableRow("bad_text", str(error)) from error
    return text


def with_system(row: Mapping[str, Any], turns: Turns) -> Turns:
    """A dialogue with the row's column ``system`` in front; an empty one is none.

    Raises:
      UnusableRow: it is no text, or the dialogue has another system prompt.
    """
    system = row.get("system")
    if system is None or system == "":
        return turns
    if not isinstance(system, str):
        raise UnusableRow("bad_message", f"system {str(system)[:80]!r} is no text")
    if turns and turns[0].role == "system":
        if turns[0].text == system:
            return turns
        raise UnusableRow("bad_message", "the column system beside another system message")
    return (Message("system", _valid(system)), *turns)


def template_arguments(row: Mapping[str, Any]) -> dict[str, Any]:
    """What a row gives the chat template beside messages: the columns ``tools`` and ``documents``,
    lists or JSON, and the entries of ``chat_template_kwargs``.

    Raises:
      UnusableRow: one of them is something else.
    """
    found: dict[str, Any] = {}
    for name in ARGUMENTS:
        value = row.get(name)
        if isinstance(value, str):
            try:
                value = json.loads(value) if value.strip() else None
            except ValueError as error:
                raise UnusableRow("bad_json", f"{name}: {error}") from error
        if value is None or value == []:
            continue
        if name == "chat_template_kwargs":
            if not isinstance(value, Mapping):
                raise UnusableRow("bad_json", f"{name} is a {type(value).__name__}, no object")
            found |= {key: entry for key, entry in value.items() if entry is not None}
        elif isinstance(value, list):
            found[name] = value
        else:
            raise UnusableRow("bad_json", f"{name} is a {type(value).__name__} and not a list")
    return found


ARGUMENTS = ("tools", "documents", "chat_template_kwargs")
"""Columns of `template_arguments`."""


def split_last_answer(turns: Turns) -> tuple[Turns, Turns]:
    """A dialogue's turns up to its last answer, and that answer.

    Raises:
      UnusableRow: it does not end with one.
    """
    if not turns or turns[-1].role != "assistant":
        raise UnusableRow("empty_response", "messages do not end with an assistant turn")
    return turns[:-1], turns[-1:]


def split_common_prompt(chosen: Turns, rejected: Turns) -> tuple[Turns, Turns, Turns]:
    """TRL's implicit prompt: the turns, up to a user's or a tool's, that begin two conversations.

    Returns:
      (prompt, rest of the chosen conversation, rest of the rejected one).
    """
    common = 0
    for place, (ours, theirs) in enumerate(zip(chosen[:-1], rejected[:-1], strict=False)):
        if ours != theirs:
            break
        if ours.role in ("user", "tool"):
            common = place + 1
    return chosen[:common], chosen[common:], rejected[common:]


def check_prompt(prompt: Turns) -> None:
    """
    Raises:
      UnusableRow: nobody asks anything in the prompt of a row without responses.
    """
    if prompt and prompt[-1].role in ("system", "developer"):
        raise UnusableRow("turn_order", "the prompt ends with a system turn: nobody asks anything")


def check_dialogue(dialogue: Turns, samples: bool = False) -> None:
    """
    Args:
      dialogue: prompt and response; the chat template says whether it takes their order.
      samples: whether the last turn was sampled, and may be empty.

    Raises:
      UnusableRow: nobody asks anything, or somebody says nothing.
    """
    roles = [turn.role for turn in dialogue]
    if "user" not in roles:
        raise UnusableRow("no_prompt", "no turn of a user")
    for place, turn in enumerate(dialogue):
        if not turn.is_empty or (samples and place == len(dialogue) - 1):
            continue
        if turn.role == "assistant":
            raise UnusableRow("empty_response", f"turn {place + 1}, of the assistant, is empty")
        if turn.role == "user":
            raise UnusableRow("empty_prompt", f"turn {place + 1}, of the user, is empty")
