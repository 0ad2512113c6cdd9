"""Where a dialogue's images and videos stand, and which they are.

Parts of messages say it; where there are none, the tags ``<image>`` and ``<video>`` in texts of the
user do, if there are as many as media. Where nothing says it, media stand before the text of the
first user turn, see `records.placed`. A tag is text wherever no medium can belong to it: in a row
without such a medium, beside parts, in what the system and the assistant say, and with a backslash
in front, which goes.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from mmpo_jax.data.formats.media import MediaFolder
from mmpo_jax.data.formats.tags import TAGS, count_tags, split_tags
from mmpo_jax.data.formats.turns import MediaPart, Message, Turns
from mmpo_jax.data.records import IMAGE, VIDEO, ImageRef, Medium, Piece, Turn, VideoRef, placed
from mmpo_jax.data.rows import UnusableRow


@dataclasses.dataclass(frozen=True)
class Placed:
    """A dialogue whose turns have the places of its media, and these in order."""

    turns: tuple[Turn, ...]
    images: tuple[ImageRef, ...]
    videos: tuple[VideoRef, ...]


def place_media(
    dialogue: Turns,
    images: tuple[ImageRef, ...],
    videos: tuple[VideoRef, ...],
    folder: MediaFolder,
) -> Placed:
    """The dialogue with its media in place.

    Args:
      dialogue: prompt and response.
      images, videos: of the row's columns.
      folder: finds what parts name.

    Raises:
      UnusableRow: there are more or fewer places than media, or a part's picture cannot be found.
    """
    media: dict[Medium, Sequence[Any]] = {IMAGE: images, VIDEO: videos}
    if any(turn.parts for turn in dialogue if turn.role == "assistant"):
        raise UnusableRow("image_position", "the assistant shows an image or a video")
    if any(turn.parts for turn in dialogue):
        found = {m: _of_parts(dialogue, m, media[m], folder) for m in media}
        turns = tuple(_turn(turn, _kinds(turn.pieces)) for turn in dialogue)
        return _usual(Placed(turns, tuple(found[IMAGE]), tuple(found[VIDEO])))
    shown = [medium for medium in media if media[medium]]
    counts = {medium: _count(dialogue, medium) for medium in shown}
    if any(counts.values()):
        for medium, count in counts.items():
            if count != len(media[medium]):
                raise UnusableRow("placeholder_count", _mismatch(medium, count, media[medium]))
    turns = tuple(
        _tagged(turn, shown) if shown and turn.role == "user" else _turn(turn, _kinds(turn.pieces))
        for turn in dialogue
    )
    return _usual(Placed(turns, images, videos))


def _usual(shown: Placed) -> Placed:
    """Without places that say what holds where nothing is said."""
    media = tuple(medium for turn in shown.turns for medium in turn.media)
    first = next((n for n, turn in enumerate(shown.turns) if turn.role == "user"), None)
    if first is None or not media or isinstance(shown.turns[first].content, str):
        return shown
    turn = shown.turns[first]
    texts = tuple(piece for piece in turn.content if not isinstance(piece, Medium))
    bare = dataclasses.replace(turn, content=texts[0] if len(texts) == 1 else texts)
    turns = (*shown.turns[:first], bare, *shown.turns[first + 1 :])
    counts = len(shown.images), len(shown.videos)
    if [one.content for one in placed(turns, *counts)] != [one.content for one in shown.turns]:
        return shown
    return dataclasses.replace(shown, turns=turns)


def _mismatch(medium: Medium, count: int, media: Sequence[Any]) -> str:
    tag = TAGS[medium]
    return (
        f"{count} {tag} in the user's texts for {len(media)} {medium.value}s; write as many, or "
        f"none for {medium.value}s in front of the text, and \\{tag} where the tag is text"
    )


def _of_parts(
    dialogue: Turns, medium: Medium, column: Sequence[Any], folder: MediaFolder
) -> list[Any]:
    """What the parts of one kind show: what they name, else the column's entries in order."""
    parts = [part for turn in dialogue for part in turn.parts if part.medium is medium]
    named = [folder.part(part.part) if part.part is not None else None for part in parts]
    waiting = named.count(None)
    if waiting == 0 and named and len(column) in (0, len(named)):
        return named  # a column beside them says the same again
    if waiting != len(column):
        kind = medium.value
        detail = f"{waiting} {kind} parts that name none, for {len(column)} {kind}s of the columns"
        raise UnusableRow("placeholder_count", detail)
    left = iter(column)
    return [next(left) if one is None else one for one in named]


def _count(dialogue: Turns, medium: Medium) -> int:
    return sum(count_tags(turn.text, medium) for turn in dialogue if turn.role == "user")


def _tagged(message: Message, media: Sequence[Medium]) -> Turn:
    """A turn with media in place of the tags in its texts."""
    found: list[Piece] = []
    for text in message.pieces:
        assert isinstance(text, str)
        found += split_tags(text, media)
    tagged = any(isinstance(piece, Medium) for piece in found)
    return dataclasses.replace(_turn(message, tuple(found)), tagged=tagged)


def _kinds(pieces: Sequence[str | MediaPart]) -> tuple[Piece, ...]:
    return tuple(piece.medium if isinstance(piece, MediaPart) else piece for piece in pieces)


def _turn(message: Message, content: tuple[Piece, ...]) -> Turn:
    said: str | tuple[Piece, ...] = content
    shows = any(isinstance(piece, Medium) for piece in content)
    if not shows and (isinstance(message.content, str) or len(content) <= 1):
        said = "".join(map(str, content))
    return Turn(message.role, said, message.keys, message.learned, message.tagged)
