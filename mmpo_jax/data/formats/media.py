"""The images and videos that a row names or holds."""

import functools
import os
import posixpath
from collections.abc import Mapping
from typing import Any

from etils import epath

from mmpo_jax.core.errors import DataError
from mmpo_jax.core.files import walk
from mmpo_jax.data.formats.entries import (
    IMAGE_ENDINGS,
    PART_KINDS,
    Kind,
    entries,
    is_video_file,
    is_video_name,
    read_image,
    read_part,
    read_video,
    said_beside,
)
from mmpo_jax.data.formats.media_keys import READ, read_rate, read_seconds, unread_keys
from mmpo_jax.data.images import resolve_image
from mmpo_jax.data.records import ImageRef, MediaRef, VideoRef
from mmpo_jax.data.rows import Row, brief
from mmpo_jax.data.skipped import UnusableRow

IN_THE_ROW = "(bytes in the row)"
"""Name of an image that has none."""


class MediaFolder:
    """The folder below which a file's images and videos lie.

    Args:
      root: which no path may leave.
      option: by which users name it.
    """

    def __init__(self, root: epath.PathLike, option: str = "image_root"):
        self.root = epath.Path(root)
        self.option = option
        self.missed: dict[str, None] = {}
        """Paths where nothing was."""
        self.listed: dict[str, list[str]] = {}
        """Folders of frames -> the images in them."""
        self.searched = False
        """Whether something was looked for everywhere, and not found."""
        self.unread_keys: set[str] = set()
        """Keys of entries that mean nothing here, since it was emptied."""

    def images(self, row: Row) -> tuple[ImageRef, ...]:
        """The images of the columns ``images`` or ``image``, in the order of `entries`.

        Raises:
          UnusableRow: as `image`.
        """
        return tuple(self.image(entry) for entry in entries(row, "image"))

    def videos(self, row: Row) -> tuple[VideoRef, ...]:
        """The videos of the columns ``videos`` or ``video``, in the order of `entries`.

        Raises:
          UnusableRow: as `video`.
        """
        found = enumerate(entries(row, "video"), start=1)
        return tuple(self.video(entry, number) for number, entry in found)

    def part(self, part: Mapping[str, Any]) -> MediaRef | None:
        """What a content part of a message names (its type one of `PART_KINDS`); None where it
        names nothing and so means the next entry of the columns.

        Raises:
          UnusableRow: as `image` and `video`.
        """
        named = read_part(part)
        if named is None:
            if part.get("file_id") is not None:
                detail = (
                    f"file_id {brief(part['file_id'])} is another service's; give a path or data"
                )
                raise UnusableRow("bad_image_entry", detail)
            self._check_bare(part)
            return None
        medium, entry = named
        return self.image(entry) if medium == "image" else self.video(entry)

    def _check_bare(self, part: Mapping[str, Any]) -> None:
        """
        Raises:
          UnusableRow: a part that names nothing says how it is shown.
        """
        medium = PART_KINDS.get(str(part.get("type")))
        if medium is None:
            return
        said = said_beside(part, medium)
        if medium == "video" and any(name in said for name in READ):
            detail = f"{brief(part)} names no video; say it where the video is named"
            raise UnusableRow("media_option", detail)
        self._count_unread(said, medium)

    def _count_unread(self, said: Mapping[str, Any], medium: Kind) -> None:
        """
        Raises:
          UnusableRow: a key would change what is shown, and is not read.
        """
        read = READ if medium == "video" else ()
        self.unread_keys.update(unread_keys(said, medium, read))

    def image(self, entry: Any, *, deeper: bool = False) -> ImageRef:
        """An image as `read_image` takes it, such as its path, its encoded bytes or
        ``{"bytes": ..., "path": ...}``, as `datasets` stores it.

        Args:
          deeper: a path may lie deeper than it says, as archives add folders on top.

        Raises:
          UnusableRow: it is none of these, there is no such file, or a key of the entry would
            change what is shown.
        """
        self._count_unread(said_beside(entry, "image"), "image")
        return self._found(entry, deeper)

    def _found(self, entry: Any, deeper: bool = False) -> ImageRef:
        """The file that an entry names or holds."""
        data, path = read_image(entry)
        if data is None:
            assert path is not None
            return ImageRef(path, path=self._file(path, deeper))
        name = path or IN_THE_ROW
        if not data:
            raise UnusableRow("image_broken", f"image {name} is empty (0 bytes)")
        return ImageRef(name, data=data)

    def _file(self, path: str, deeper: bool) -> epath.Path:
        """The file of a path; back slashes part folders where no name has them."""
        file = self._resolve(path)
        if _exists(file, folder=False):
            return file
        if "\\" in path:
            return self._file(path.replace("\\", "/"), deeper)
        found = self._find(path) if deeper else None
        if found is None or not _exists(found, folder=False):
            raise self._missing("file", path, file, deeper)
        return found

    def video(self, entry: Any, number: int = 1, *, deeper: bool = False) -> VideoRef:
        """A video given by its file, as an image is; or by its frames: their list, each as an image
        is, or the folder they lie in. With a rate as ``{"frames": ..., "fps": ...}``, which is that
        of the frames, or of a file that of the frames to be chosen; of a file also with
        ``video_start`` and ``video_end``, in seconds.

        Args:
          number: of the video in its row, for messages.
          deeper: any other text names a folder of frames, which may lie deeper than it says.

        Raises:
          UnusableRow: it is none of these, or as `image`.
        """
        frames, said = read_video(entry)
        self._count_unread(said, "video")
        fps, seconds = read_rate(said), read_seconds(said)
        if isinstance(frames, list) and len(frames) == 1 and is_video_name(frames[0]):
            (frames,) = frames  # a list of several that holds one
        if is_video_file(frames) and not (isinstance(frames, str) and self._is_folder(frames)):
            file = self._found(frames)
            return VideoRef(file.name, fps=fps, file=file, seconds=seconds)
        if seconds is not None:
            detail = "video_start and video_end are of a video's file; leave frames out of a list"
            raise UnusableRow("media_option", detail)
        if isinstance(frames, str) and frames and (deeper or self._is_folder(frames)):
            found = self.folder_video(frames).frames
            return VideoRef(f"video {number} ({frames})", found, fps)
        if not isinstance(frames, list) or not frames:
            detail = (
                f"{brief(entry)} is no video: give its file (MP4, WebM), a list of its frames, or "
                "the folder they lie in"
            )
            raise UnusableRow("bad_video_entry", detail)
        found = tuple(self.image(frame) for frame in frames)
        return VideoRef(f"video {number} (from {found[0].name} on)", found, fps)

    def _is_folder(self, path: str) -> bool:
        return "://" not in path and _exists(self._resolve(path), folder=True)

    def folder_video(self, entry: Any) -> VideoRef:
        """The images in a folder, in the order of the numbers in their names, as a video.

        Raises:
          UnusableRow: there is no such folder or no image in it.
        """
        if not isinstance(entry, str) or not entry:
            raise UnusableRow("bad_video_entry", f"{brief(entry)} is no folder of frames")
        folder: epath.Path | None = self._resolve(entry)
        if folder is None or not _exists(folder, folder=True):
            folder = self._find(entry)
        if folder is None or not _exists(folder, folder=True):
            raise self._missing("folder", entry, self._resolve(entry), True)
        names = self.listed[os.fspath(folder)] = names_in(folder)
        if not names:
            raise UnusableRow("bad_video_entry", f"no image in the folder {brief(entry)}")
        frames = [
            ImageRef(f"{entry.rstrip('/')}/{name}", path=self._resolve_below(folder, name))
            for name in sorted(names, key=_numbers)
        ]
        return VideoRef(entry, tuple(frames))

    def _missing(self, kind: str, path: str, file: epath.Path, deeper: bool) -> UnusableRow:
        self.missed[os.fspath(file)] = None
        self.searched |= deeper
        detail = f"there is no {kind} {brief(path)} in {os.fspath(self.root)}"
        return UnusableRow(
            "image_missing", f"{detail}; is it elsewhere, name that folder as {self.option}"
        )

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
        for folder, folders, files in walk(self.root):
            for name in (*folders, *files):
                index.setdefault(name, []).append(posixpath.join(folder, name))
        return index


def names_in(folder: epath.Path) -> list[str]:
    """Names of the images in a folder, sorted; none where there is no such folder."""
    try:
        return sorted(p.name for p in folder.iterdir() if p.suffix.lower() in IMAGE_ENDINGS)
    except OSError:
        return []


def _numbers(name: str) -> list[tuple[int, str]]:
    """Sorts frame 10 behind frame 9."""
    parts = "".join(c if c.isdigit() else f"\0{c}\0" for c in name).split("\0")
    return [(int(part), "") if part.isdigit() else (-1, part) for part in parts if part]


def _exists(path: epath.Path, *, folder: bool) -> bool:
    try:
        return path.is_dir() if folder else path.is_file()
    except OSError:  # Such as a name that is too long to be one.
        return False
