"""Where a dialogue's images and videos stand, and which they are.

Parts of messages say it; where there are none, the tags ``<image>`` and ``<video>`` in texts of the
user do, if there are as many as media. Where nothing says it, media stand before the text of the
first user turn, see `records.placed`. A tag is text wherever no medium can belong to it: in a row
without such a medium, beside parts, in what the system and the assistant say, and with a backslash
in front, which goes. Media that keys of messages name leave the tags of other turns to be read.
"""

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any

from mmpo_jax.core.errors import DataError
from mmpo_jax.data.formats.media import MediaFolder
from mmpo_jax.data.formats.tags import TAGS, count_tags, split_tags, unescaped
from mmpo_jax.data.formats.turns import MediaPart, Message, Turns
from mmpo_jax.data.records import (
    IMAGE,
    VIDEO,
    ImageRef,
    MediaRef,
    Medium,
    Piece,
    Turn,
    VideoRef,
    placed,
)
from mmpo_jax.data.skipped import UnusableRow


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
        dialogue = _beside_keys(dialogue, {medium for medium in media if media[medium]})
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
    """A row without the places that say what holds where none is said."""
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


def _beside_keys(dialogue: Turns, shown: Collection[Medium]) -> Turns:
    """A dialogue with the tags of users read where keys of messages name media. Beside parts they
    are text, and only the backslash in front of one goes.

    Args:
      shown: the kinds of the row's columns.
    """
    parts = [part for turn in dialogue for part in turn.parts]
    if not any(part.keyed for part in parts):
        return dialogue
    kinds = {*shown, *(part.medium for part in parts)}
    are_places = all(part.keyed for part in parts)
    return tuple(
        _with_tags(turn, kinds, are_places) if turn.role == "user" else turn for turn in dialogue
    )


def _with_tags(message: Message, kinds: Collection[Medium], are_places: bool) -> Message:
    """A message whose tags of kinds that no key of it names, which are read, are places or text."""
    left = [kind for kind in kinds if not any(p.keyed and p.medium is kind for p in message.parts)]
    pieces: list[str | MediaPart] = []
    for piece in message.pieces:
        if isinstance(piece, MediaPart):
            pieces.append(piece)
        elif are_places:
            found = split_tags(piece, left)
            pieces += [MediaPart(one) if isinstance(one, Medium) else one for one in found]
        else:
            pieces.append(unescaped(piece, left))
    if pieces == list(message.pieces):
        return message
    content = pieces[0] if len(pieces) == 1 and isinstance(pieces[0], str) else tuple(pieces)
    added = sum(isinstance(piece, MediaPart) for piece in pieces) > len(message.parts)
    return dataclasses.replace(message, content=content, tagged=message.tagged or added)


def _of_parts(
    dialogue: Turns, medium: Medium, column: Sequence[Any], folder: MediaFolder
) -> list[Any]:
    """What the places of one kind show: what they name, else the column's entries in order. A
    column of as many entries as places says again what they name."""
    parts = [part for turn in dialogue for part in turn.parts if part.medium is medium]
    named = [folder.part(part.part) if part.part is not None else None for part in parts]
    kind, waiting = medium.value, named.count(None)
    if len(column) == len(named) and all(map(_agree, named, column)):
        # Of a video the column may know the rate and the seconds, too.
        pairs = zip(named, column, strict=True)
        return [one if isinstance(one, ImageRef) else other for one, other in pairs]
    if waiting != len(column):
        detail = (
            f"{waiting} places of {kind}s that name none, for {len(column)} {kind}s of the columns"
        )
        if len(column) == len(named):
            detail += ", which are not those that messages name"
        raise UnusableRow("placeholder_count", detail)
    left = iter(column)
    return [next(left) if one is None else one for one in named]


def _agree(named: MediaRef | None, other: MediaRef) -> bool:
    """Whether a place names nothing, or what the column has there."""
    if named is None:
        return True
    if isinstance(named, VideoRef) and isinstance(other, VideoRef):
        same = len(named.frames) == len(other.frames) and named.fps in (None, other.fps)
        same = same and named.seconds in (None, other.seconds)
        return same and all(map(_agree, named.parts, other.parts))
    if not isinstance(named, ImageRef) or not isinstance(other, ImageRef):
        return False
    if named.path is not None and named.path == other.path:
        return True
    try:
        return named.fingerprint() == other.fingerprint()
    except DataError:  # a file that cannot be read
        return False


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
