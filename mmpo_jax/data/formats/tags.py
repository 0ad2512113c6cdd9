"""The tags that stand for media in texts, and their escape."""

import re
from collections.abc import Collection

from mmpo_jax.data.records import IMAGE, VIDEO, Medium, Piece

TAGS = {IMAGE: "<image>", VIDEO: "<video>"}


def count_tags(text: str, medium: Medium) -> int:
    """How many tags of a medium a text has; one behind a backslash is text."""
    return len(re.findall(rf"(?<!\\){TAGS[medium]}", text))


def split_tags(text: str, media: Collection[Medium]) -> list[Piece]:
    """A text with media in place of their tags, and without the backslash of those that are text.

    Args:
      media: the kinds whose tags are looked for.
    """
    tags = "|".join(TAGS[medium] for medium in media)
    if not tags:
        return [text]
    kinds = {tag: medium for medium, tag in TAGS.items()}
    pieces = filter(None, re.split(rf"(?<!\\)({tags})", text))
    return [kinds.get(piece) or unescaped(piece, media) for piece in pieces]


def unescaped(text: str, media: Collection[Medium]) -> str:
    """A text without the backslash in front of the tags of these kinds."""
    tags = "|".join(TAGS[medium] for medium in media)
    return re.sub(rf"\\({tags})", r"\1", text) if tags else text
