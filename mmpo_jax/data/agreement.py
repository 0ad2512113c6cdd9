"""Whether all processes of a command read the same rows and see the same images.

Each reads the files of its own host. Where that is one file system for all, its state says that a
file is the same one; copies are compared by their digests.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from mmpo_jax.core import progress
from mmpo_jax.core.files import fingerprint_items, is_local
from mmpo_jax.core.known_files import state_of
from mmpo_jax.core.processes import check_same, member, several
from mmpo_jax.data.image_states import THREADS, Seen, digest_at
from mmpo_jax.data.records import MediaRef, VideoRef
from mmpo_jax.data.tokenization import TokenizedRecord, content_of


def check_same_records(name: str, records: Sequence[TokenizedRecord]) -> None:
    """Checks that all processes have the same ids, tokens and images.

    Args:
      name: of what the records are from.
      records: all of it.

    Raises:
      MmpoError: in all processes, naming one that differs from the first.
    """
    if not several():
        return
    with progress.doing(f"comparing {name} with that of {member().count} processes"):
        check_same(
            f"{name}: the data",
            functools.partial(_fingerprint, records, _state),
            functools.partial(_fingerprint, records, _digest),
        )


def check_same_images(name: str, seen: Iterable[Seen]) -> None:
    """Checks that all processes see the images that were found when rows were read.

    Args:
      name: of the rows' file.
      seen: by whoever read them; the same in all processes.

    Raises:
      MmpoError: in all processes, naming one that differs from the first.
    """
    if not several():
        return
    paths = [path for one in seen for path in one.images]

    def in_threads(function: Any) -> str:
        with ThreadPoolExecutor(THREADS) as pool:
            return fingerprint_items(pool.map(function, paths))

    with progress.doing(f"comparing the images of {name} with those of other processes"):
        states = functools.partial(in_threads, _state_at)
        check_same(f"{name}: the images", states, functools.partial(in_threads, digest_at))


def _fingerprint(records: Sequence[TokenizedRecord], of_media: Any) -> str:
    return fingerprint_items([record.id, content_of(record, of_media)] for record in records)


def _digest(media: MediaRef) -> str:
    return media.fingerprint()


def _state(media: MediaRef) -> Any:
    """What is the same for the same file on one file system, and for equal bytes in rows."""
    if isinstance(media, VideoRef):
        return [media.fps, media.seconds, [_state(part) for part in media.parts]]
    if media.path is None:
        return media.fingerprint()
    edit = None if media.edit is None else dataclasses.asdict(media.edit)
    return [_state_at(os.fspath(media.path)), edit]


def _state_at(path: str) -> Any:
    """The state of a file; of one in a bucket, which is one for all, the name."""
    return state_of(path) if is_local(path) else path
