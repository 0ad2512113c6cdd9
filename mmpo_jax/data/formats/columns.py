"""Pictures in columns that are called otherwise than ``images`` and ``image``."""

import re
from collections.abc import Iterator
from typing import Any

from mmpo_jax.data.formats.entries import entries, looks_like_picture, read_part
from mmpo_jax.data.rows import Row

PICTURE_COLUMNS = (
    "image",
    "images",
    "image_bytes",
    "image_base64",
    "jpg",
    "jpeg",
    "png",
    "webp",
    "img",
    "imgs",
    "picture",
    "pictures",
    "photo",
    "photos",
    "image_path",
    "image_paths",
    "img_path",
    "img_paths",
    "image_file",
    "image_files",
    "image_filename",
    "image_name",
    "file_name",
    "filename",
    "image_url",
    "image_urls",
)
"""Names, in small letters, of columns that are read as the images where a row has none under the
names that are ours; the first of them that holds any."""

_SUGGESTS_PICTURES = re.compile(
    r"image|img|(?<![a-z])pic(ture|s?$)|photo|pixel|jpe?g|png|webp", re.I
)
_DIALOGUES = (
    "prompt",
    "question",
    "chosen",
    "rejected",
    "completion",
    "messages",
    "responses",
    "conversations",
)
_OURS = ("image", "images", "video", "videos")
"""Columns, and keys of messages, that hold media."""
_MAX_DEPTH = 8
"""Depth of lists and messages in each other, of which parts are four deep."""


def with_pictures(row: Row) -> tuple[Row, str | None]:
    """The row with its pictures as ``images``, and the name of the column that held them.

    The row stays as it is, and the name is None, where it has images or videos under our names or
    in its messages, or no column of `PICTURE_COLUMNS` plainly holds pictures: encoded ones, or the
    name of a file with an ending of images. So a URL in the web or a number is none.
    """
    if (
        entries(row, "image")
        or entries(row, "video")
        or any(_named_in(row.get(n)) for n in _DIALOGUES)
    ):
        return row, None
    found = [name for name, value in row.items() if _is_known(name) and looks_like_picture(value)]
    if not found:
        return row, None
    column = min(found, key=lambda name: PICTURE_COLUMNS.index(name.lower()))
    kept = {name: value for name, value in row.items() if name not in (column, "image")}
    return {**kept, "images": row[column]}, column


def may_hold_pictures(name: str, value: Any) -> bool:
    """Whether a column that is not read looks like one of pictures, by its name or its value."""
    return bool(_SUGGESTS_PICTURES.search(name)) or looks_like_picture(value)


def _is_known(name: str) -> bool:
    return name.lower() in PICTURE_COLUMNS


def _named_in(value: Any) -> bool:
    """Whether some message in a value, or a content part of one, names a medium."""
    return any(
        read_part(part) is not None or any(part.get(name) for name in _OURS)
        for part in _parts(value)
    )


def _parts(value: Any, depth: int = 0) -> Iterator[dict[str, Any]]:
    if depth >= _MAX_DEPTH:
        return
    if isinstance(value, dict):
        yield value
        yield from _parts(value.get("content"), depth + 1)
    elif isinstance(value, list):
        for entry in value:
            yield from _parts(entry, depth + 1)
