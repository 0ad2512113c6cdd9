"""What a row's entries for images and videos say: encoded bytes, or a path."""

import base64
import binascii
import posixpath
import re
from collections.abc import Mapping
from typing import Any, Literal
from urllib.parse import unquote, unquote_to_bytes, urlsplit

from mmpo_jax.data.formats.media_keys import READ, other_keys
from mmpo_jax.data.rows import Row, brief
from mmpo_jax.data.skipped import UnusableRow

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
VIDEO_ENDINGS = (".mp4", ".m4v", ".mov", ".webm", ".mkv")
Kind = Literal["image", "video"]

PART_KINDS: Mapping[str, Kind] = {
    "image": "image",
    "image_url": "image",
    "input_image": "image",
    "video": "video",
    "video_url": "video",
    "input_video": "video",
}
"""Types of a message's content parts that are media."""

_DATA = ("bytes", "base64", "data")
"""Keys of an entry that hold the encoded image, as bytes or as base64."""
_NESTED = ("image", "image_url", "url", "source", "input_image")
"""Keys of an entry that hold another."""
_VIDEO = ("frames", "video", "video_url", "url", "path", "input_video")
"""Keys of a part that hold a video."""
_HELD: Mapping[Kind, frozenset[str]] = {
    "image": frozenset({*_DATA, *_NESTED, "path"}),
    "video": frozenset({*_DATA, *_VIDEO}),
}
"""Keys of an entry that say which medium it is."""
_MAX_DEPTH = 4
_MAGIC = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF8", b"II*\0", b"MM\0*", b"RIFF", b"BM")
_ENCODED_MAGIC = ("iVBORw0KGgo", "/9j/", "R0lGOD", "SUkqA", "TU0AK", "UklGR")
"""What base64 of images begins with."""
_MIN_ENCODED = 64
"""Characters from which on a text of that beginning is base64 and no path."""
_BASE64 = re.compile(r"[A-Za-z0-9+/_\s-]+={0,2}\s*")


def entries(row: Row, medium: Kind) -> list[Any]:
    """What the row's column of several, else that of one, holds; one list per video, and images
    without the lists they may stand in.

    An empty list says nothing: files of columns have one in every row that uses the other column.
    What columns say beside that of videos (`READ`) holds for those that do not say it themselves.

    Raises:
      UnusableRow: such a column is a list of another length.
    """
    column = read_column(row, medium)
    found = [] if column is None else row[column]
    if medium == "image":
        flat: list[Any] = []
        for entry in found if isinstance(found, list) else [found]:
            flat.extend(entry if isinstance(entry, list) else [entry])
        return flat
    one = column == "video" and not (
        isinstance(found, list) and found and all(map(_is_video, found))
    )
    videos = [found] if one or not isinstance(found, list) else found
    said = {name: row[name] for name in READ if row.get(name) is not None}
    return [_with_said(video, said, place, len(videos)) for place, video in enumerate(videos)]


def _with_said(video: Any, columns: Mapping[str, Any], place: int, count: int) -> Any:
    """An entry with what columns say of it, a value each or a list with one for every video."""
    said = {}
    for name, value in columns.items():
        if isinstance(value, list) and len(value) != count:
            detail = f"{name} has {len(value)} entries, there are {count} videos"
            raise UnusableRow("bad_video_entry", detail)
        said[name] = value[place] if isinstance(value, list) else value
    own = said_beside(video, "video")
    said = {name: value for name, value in said.items() if name not in own and value is not None}
    return {"frames": video, **said} if said else video


def read_column(row: Row, medium: Kind) -> str | None:
    """The name of the column that `entries` reads."""
    several = row.get(f"{medium}s")
    if several is not None and several != []:
        return f"{medium}s"
    return medium if row.get(medium) is not None else None


def _is_video(entry: Any) -> bool:
    return (
        isinstance(entry, list)
        or is_video_name(entry)
        or (isinstance(entry, Mapping) and ("frames" in entry or is_video_file(entry)))
    )


def is_video_file(entry: Any) -> bool:
    """Whether an entry is a video's file: its name, its bytes, or an object with one of these."""
    if isinstance(entry, bytes | bytearray):
        return True
    if isinstance(entry, Mapping):
        held = any(entry.get(key) is not None for key in _DATA)
        names = (entry.get(key) for key in ("video", "path", "url"))
        return held or any(map(is_video_name, names))
    return is_video_name(entry)


def is_video_name(entry: Any) -> bool:
    """Whether an entry is the name of a video's file, by its ending, or a data URL of a video."""
    if not isinstance(entry, str):
        return False
    name = entry[:1024].lower()
    return name.startswith("data:video/") or name.endswith(VIDEO_ENDINGS)


def read_image(entry: Any, depth: int = 0) -> tuple[bytes | None, str | None]:
    """(encoded image or None, path or None) of an entry, one of which is there.

    An entry is a path, a ``file://`` URL, a data URL, base64 by itself, bytes, or an object with
    bytes or base64 (and a path, which is then a name), a path, or an entry under ``image_url``,
    ``url``, ``image`` or ``source``.

    Raises:
      UnusableRow: it is none of these, or a URL that would have to be downloaded.
    """
    if isinstance(entry, bytes | bytearray):
        return bytes(entry), None
    if isinstance(entry, str) and entry:
        return _read_text(entry)
    if isinstance(entry, Mapping) and depth < _MAX_DEPTH:
        path = entry.get("path")
        path = path if isinstance(path, str) and path else None
        for key in _DATA:
            value = entry.get(key)
            if isinstance(value, bytes | bytearray):
                return bytes(value), path
            if isinstance(value, str):
                return _decoded(value, key), path
            if value is not None:
                detail = f"{key}: {brief(value)} is neither bytes nor base64"
                raise UnusableRow("bad_image_entry", detail)
        for key in _NESTED:
            if entry.get(key) is not None:
                return read_image(entry[key], depth + 1)
        if path is not None:
            return _read_text(path)
    raise UnusableRow("bad_image_entry", f"{brief(entry)} is neither a path nor bytes")


def read_video(entry: Any) -> tuple[Any, dict[str, Any]]:
    """(the file of a video, its frames or the folder with them; what else its entry says)."""
    if not isinstance(entry, Mapping):
        return entry, {}
    said = said_beside(entry, "video")
    shown: Any = entry
    for _ in range(_MAX_DEPTH):
        if any(shown.get(key) is not None for key in _DATA):
            return {key: shown[key] for key in (*_DATA, "path") if key in shown}, said
        shown = next((shown[key] for key in _VIDEO if shown.get(key) is not None), None)
        if not isinstance(shown, Mapping):
            break
    return shown, said


def said_beside(entry: Any, medium: Kind) -> dict[str, Any]:
    """What an entry for a medium says beside which one it is, see `other_keys`."""
    return other_keys(entry, _HELD[medium]) if isinstance(entry, Mapping) else {}


def read_part(part: Mapping[str, Any]) -> tuple[Kind, Any] | None:
    """The medium that a message's content part names, and the entry for it; None where it names
    nothing, as parts do that stand for the next entry of the columns."""
    medium = PART_KINDS.get(str(part.get("type")))
    keys = {"image": (*_DATA, *_NESTED, "path"), "video": _VIDEO, None: ()}[medium]
    given = {key: part[key] for key in keys if part.get(key) is not None}
    if medium is None or not given:
        return None
    return medium, {**given, **said_beside(part, medium)}


def same_part(one: Mapping[str, Any] | None, other: Mapping[str, Any] | None) -> bool:
    """Whether two content parts name the same medium: equal bytes or, as no file is read, equal
    paths."""
    return _named(one) == _named(other)


def _named(part: Mapping[str, Any] | None) -> Any:
    found = None if part is None else read_part(part)
    if found is None or found[0] == "video":
        return found or part
    data, path = read_image(found[1])
    return data or (path and posixpath.normpath(path))


def looks_like_picture(value: Any, depth: int = 0) -> bool:
    """Whether a value is plainly an image on this machine: encoded bytes, base64, or the name of a
    file with an ending of images."""
    if isinstance(value, bytes | bytearray):
        return _is_encoded(value)
    if isinstance(value, str):
        name = value.lower()
        if name.startswith("data:image/") or _is_base64(value):
            return True
        return len(name) < 1024 and name.endswith(IMAGE_ENDINGS) and not is_web(name)
    if depth >= _MAX_DEPTH:
        return False
    if isinstance(value, Mapping):
        keys = (*_DATA, *_NESTED, "path")
        return any(looks_like_picture(value.get(key), depth + 1) for key in keys)
    return (
        isinstance(value, list)
        and bool(value)
        and all(looks_like_picture(entry, depth + 1) for entry in value)
    )


def is_web(text: str) -> bool:
    """Whether a text is a URL of something to download."""
    return text[:8].lower().startswith(("http://", "https://"))


def _read_text(text: str) -> tuple[bytes | None, str | None]:
    if text[:5].lower() == "data:":
        return _from_data_url(text), None
    if is_web(text):
        detail = f"{brief(text)} is not downloaded; save the image and give the file's path"
        raise UnusableRow("image_url", detail)
    if text[:7].lower() == "file://":
        return None, unquote(urlsplit(text).path)
    if _is_base64(text):
        return _decoded(text, "image"), None
    return None, text


def _from_data_url(url: str) -> bytes:
    header, comma, body = url.partition(",")
    if not comma:
        raise UnusableRow("bad_image_entry", f"{brief(url)} is a data URL without data")
    if header.lower().rstrip().endswith(";base64"):
        return _decoded(unquote(body) if "%" in body else body, "data URL")
    return unquote_to_bytes(body)


def _decoded(text: str, name: str) -> bytes:
    """The bytes of base64 with or without line breaks, padding and a data URL's beginning, in
    either alphabet.

    Raises:
      UnusableRow: it is no base64, or under ``bytes`` that of no image.
    """
    if text[:5].lower() == "data:":
        return _from_data_url(text)
    plain = "".join(text.split()).translate(str.maketrans("-_", "+/")).rstrip("=")
    try:
        data = base64.b64decode(plain + "=" * (-len(plain) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise UnusableRow("bad_image_entry", f"{name} is no base64: {error}") from error
    if name == "bytes" and not _is_encoded(data):
        raise UnusableRow("bad_image_entry", f"bytes: {brief(text)} is a text and no image")
    return data


def _is_base64(text: str) -> bool:
    """Whether a text is base64 of an image: by its beginning, and it has no path's characters."""
    begins = text.lstrip()[:16].translate(str.maketrans("-_", "+/")).startswith(_ENCODED_MAGIC)
    return begins and len(text) >= _MIN_ENCODED and _BASE64.fullmatch(text) is not None


def _is_encoded(data: bytes | bytearray) -> bool:
    if data.startswith(b"RIFF"):
        return data[8:12] == b"WEBP"
    return data.startswith(_MAGIC)
