"""Whether the images that rows show are still what they were when the rows were read."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from etils import epath

from mmpo_jax.core.errors import DataError
from mmpo_jax.core.known_files import recall_all, state_of
from mmpo_jax.data.formats.media import MediaFolder, names_in
from mmpo_jax.data.records import ImageRef, Record

THREADS = 16


@dataclasses.dataclass(frozen=True)
class Seen:
    """What reading some rows found of files."""

    images: dict[str, str | None]
    """Path of an image -> SHA-256; None where it could not be read."""
    missed: tuple[str, ...]
    """Paths where nothing was."""
    folders: dict[str, list[str]]
    """Folder of frames -> the images in it."""
    searched: bool
    """Whether something was looked for everywhere, and not found."""

    def to_json(self) -> dict[str, Any]:
        """JSON that `from_json` reads."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Seen:
        """What `to_json` made the value of."""
        return cls(value["images"], tuple(value["missed"]), value["folders"], value["searched"])


def seen_by(records: Iterable[Record], media: MediaFolder) -> Seen:
    """What reading records found of files.

    Args:
      records: whose images were checked.
      media: found their images.
    """
    images: dict[str, str | None] = {}
    for image in images_of(records):
        if image.path is not None:
            try:
                digest = dataclasses.replace(image, edit=None).fingerprint()
            except DataError:
                digest = None
            images[os.fspath(image.path)] = digest
    return Seen(images, tuple(media.missed), media.listed, media.searched)


def images_of(records: Iterable[Record]) -> Iterator[ImageRef]:
    """All images, frames and video files that records show."""
    for record in records:
        yield from record.images
        yield from record.other_images or ()
        for response in record.responses:
            yield from response.images or ()
        for video in record.videos:
            yield from video.parts


def changed(seen: Sequence[Seen], done: Callable[[], None]) -> list[int]:
    """Places of those that would find something else now.

    A file that is in the state it was in when it was last read is not read.

    Args:
      seen: each of some rows.
      done: is called after each.
    """
    stale = []
    with ThreadPoolExecutor(THREADS) as pool:
        for place, one in enumerate(seen):
            if one.searched or _differs(one, pool):
                stale.append(place)
            done()
    return stale


def _differs(seen: Seen, pool: ThreadPoolExecutor) -> bool:
    if any(epath.Path(path).exists() for path in seen.missed):
        return True
    if any(names_in(epath.Path(folder)) != names for folder, names in seen.folders.items()):
        return True
    states = pool.map(state_of, seen.images)
    known = recall_all(seen.images)
    unknown = []
    for (path, digest), state in zip(seen.images.items(), states, strict=True):
        before, facts = known.get(path, (None, {}))
        if state is None or state != before or "sha256" not in facts:
            unknown.append(path)
        elif facts["sha256"] != digest:
            return True
    return list(pool.map(digest_at, unknown)) != [seen.images[path] for path in unknown]


def digest_at(path: str) -> str | None:
    """SHA-256 of an image; None where it cannot be read."""
    try:
        return ImageRef(path, path=epath.Path(path)).fingerprint()
    except DataError:
        return None
