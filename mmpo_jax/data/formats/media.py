"""The images and videos that a row names or holds."""

import base64
import binascii
import functools
import math
import os
import posixpath
from collections.abc import Mapping
from typing import Any, Literal

from etils import epath

from mmpo_jax.data.images import resolve_image
from mmpo_jax.data.records import ImageRef, VideoRef
from mmpo_jax.data.rows import Row, UnusableRow
from mmpo_jax.errors import DataError
from mmpo_jax.files import is_local

IN_THE_ROW = "(bytes in the row)"
"""Name of an image that has none."""
IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


class MediaFolder:
    """The folder below which a file's images and videos lie.

    Args:
      root: which no path may leave.
    """

    def __init__(self, root: epath.PathLike):
        self.root = epath.Path(root)

    def images(self, row: Row) -> tuple[ImageRef, ...]:
        """Those of the columns ``images`` (a list) or ``image``.

        Raises:
          UnusableRow: as `image`.
        """
        return tuple(self.image(entry) for entry in entries(row, "image"))

    def videos(self, row: Row) -> tuple[VideoRef, ...]:
        """Those of the columns ``videos`` (a list) or ``video``.

        Raises:
          UnusableRow: as `video`.
        """
        found = enumerate(entries(row, "video"), start=1)
        return tuple(self.video(entry, number) for number, entry in found)

    def image(self, entry: Any) -> ImageRef:
        """An image given by its path, its encoded bytes, or ``{"bytes": ..., "path": ...}`` as
        `datasets` stores it; ``base64`` stands for bytes where there is only text.

        Raises:
          UnusableRow: it is none of these, or there is no such file.
        """
        fields = entry if isinstance(entry, Mapping) else {}
        data = entry if isinstance(entry, bytes) else fields.get("bytes", _from_base64(fields))
        path = entry if isinstance(entry, str) else fields.get("path")
        if isinstance(data, bytes):
            name = path if isinstance(path, str) and path else IN_THE_ROW
            if not data:
                raise UnusableRow("image_broken", f"image {name} is empty (0 bytes)")
            return ImageRef(name, data=data)
        if data is not None or not isinstance(path, str) or not path:
            raise UnusableRow("bad_image_entry", f"{str(entry)[:80]!r} is neither a path nor bytes")
        file = self._resolve(path)
        if not _exists(file, folder=False):
            raise _missing("file", path, self.root)
        return ImageRef(path, path=file)

    def video(self, entry: Any, number: int = 1) -> VideoRef:
        """A video given by the list of its frames, each as an image is, or as
        ``{"frames": [...], "fps": ...}``; video files are not decoded.

        Raises:
          UnusableRow: it is none of these, or as `image`.
        """
        frames, fps = entry, None
        if isinstance(entry, Mapping):
            frames, fps = entry.get("frames"), entry.get("fps")
        if not isinstance(frames, list) or not frames:
            detail = f"{str(entry)[:80]!r} is no list of frames; video files are not decoded"
            raise UnusableRow("bad_video_entry", detail)
        if fps is not None:
            known = isinstance(fps, int | float) and not isinstance(fps, bool)
            if not (known and fps > 0 and math.isfinite(fps)):
                raise UnusableRow("bad_video_entry", f"fps {fps!r} is no positive number")
        found = tuple(self.image(frame) for frame in frames)
        return VideoRef(f"video {number} (from {found[0].name} on)", found, fps)

    def part(self, part: Mapping[str, Any]) -> ImageRef | VideoRef:
        """What a part of a message names.

        Raises:
          UnusableRow: as `image` and `video`.
        """
        return self.image(part["image"])

    def indexed_image(self, entry: Any) -> ImageRef:
        """As `image`; a path may lie deeper than it says, as archives add folders on top.

        Raises:
          UnusableRow: as `image`.
        """
        if not isinstance(entry, str) or _exists(self._resolve(entry), folder=False):
            return self.image(entry)
        found = self._find(entry)
        if found is None or not _exists(found, folder=False):
            raise _missing("file", entry, self.root)
        return ImageRef(entry, path=found)

    def folder_video(self, entry: Any) -> VideoRef:
        """The images in a folder, in the order of the numbers in their names, as a video.

        Raises:
          UnusableRow: there is no such folder or no image in it.
        """
        if not isinstance(entry, str) or not entry:
            raise UnusableRow("bad_video_entry", f"{str(entry)[:80]!r} is no folder of frames")
        folder: epath.Path | None = self._resolve(entry)
        if folder is None or not _exists(folder, folder=True):
            folder = self._find(entry)
        if folder is None or not _exists(folder, folder=True):
            raise _missing("folder", entry, self.root)
        names = [p.name for p in folder.iterdir() if p.suffix.lower() in IMAGE_ENDINGS]
        if not names:
            raise UnusableRow("bad_video_entry", f"no image in the folder {entry!r}")
        frames = [
            ImageRef(f"{entry.rstrip('/')}/{name}", path=self._resolve_below(folder, name))
            for name in sorted(names, key=_numbers)
        ]
        return VideoRef(entry, tuple(frames))

    def _resolve(self, path: str) -> epath.Path:
        try:
            return resolve_image(self.root, path)
        except DataError as error:
            raise UnusableRow("image_outside_folder", str(error)) from error

    def _resolve_below(self, folder: epath.Path, name: str) -> epath.Path:
        return self._resolve(os.fspath(folder / name))

    def _find(self, path: str) -> epath.Path | None:
        """The one file or folder whose path ends like `path`, else the one of its name."""
        wanted = posixpath.normpath(path).strip("/")
        found = self._index.get(posixpath.basename(wanted), [])
        ending = [name for name in found if f"/{name}".endswith(f"/{wanted}")]
        matches = ending or found
        return self._resolve(matches[0]) if len(matches) == 1 else None

    @functools.cached_property
    def _index(self) -> dict[str, list[str]]:
        """Name of a file or folder -> paths below the root."""
        index: dict[str, list[str]] = {}
        for folder, folders, files in _walk(self.root):
            for name in (*folders, *files):
                index.setdefault(name, []).append(posixpath.join(folder, name))
        return index


def entries(row: Row, medium: Literal["image", "video"]) -> list[Any]:
    """What the row's column of several, else that of one, holds."""
    several = row.get(f"{medium}s")
    if several is not None:
        return several if isinstance(several, list) else [several]
    return [] if row.get(medium) is None else [row[medium]]


def _walk(root: epath.Path) -> list[tuple[str, list[str], list[str]]]:
    """(path below the root, folders, files), as `os.walk` gives them."""
    if is_local(root):
        top = os.fspath(root)
        return [
            (os.path.relpath(folder, top).removeprefix("."), folders, files)
            for folder, folders, files in os.walk(top)
        ]
    found, waiting = [], [""]
    while waiting:
        place = waiting.pop()
        inside = list((root / place).iterdir())
        folders = [path.name for path in inside if path.is_dir()]
        found.append((place, folders, [path.name for path in inside if path.name not in folders]))
        waiting += [posixpath.join(place, name) for name in folders]
    return found


def _numbers(name: str) -> list[tuple[int, str]]:
    """Sorts frame 10 behind frame 9."""
    parts = "".join(c if c.isdigit() else f"\0{c}\0" for c in name).split("\0")
    return [(int(part), "") if part.isdigit() else (-1, part) for part in parts if part]


def _from_base64(fields: Mapping[str, Any]) -> bytes | None:
    text = fields.get("base64")
    if text is None:
        return None
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError, TypeError) as error:
        raise UnusableRow("bad_image_entry", f"base64: {error}") from error


def _exists(path: epath.Path, *, folder: bool) -> bool:
    try:
        return path.is_dir() if folder else path.is_file()
    except OSError:  # Such as a name that is too long to be one.
        return False


def _missing(kind: str, path: str, root: epath.Path) -> UnusableRow:
    return UnusableRow("image_missing", f"there is no {kind} {path!r} in {os.fspath(root)}")
