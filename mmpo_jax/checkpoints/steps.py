"""The folder of one saved step: what is in it, and whether that is what was saved.

    checkpoints/8/params     what is trained, and what is not
    checkpoints/8/optimizer  and other items, trees of arrays as Orbax writes them
    checkpoints/8/run        JSON: the run it belongs to, and the digests of all arrays

Orbax checks the headers of its files, and zstd that its blocks can be unpacked; neither notices
every changed bit of an array. Digests do, and are those of the arrays, so that they hold on
whatever devices these are read.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from mmpo_jax.checkpoints.digests import digests
from mmpo_jax.core.buckets import absolute, entries, is_folder, move
from mmpo_jax.core.errors import MmpoError
from mmpo_jax.core.files import fingerprint_json, is_local
from mmpo_jax.core.processes import in_shares, member

log = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
"""Folder of the steps of a run that it can go on from."""
PARAMS, RUN = "params", "run"
"""Items of every step."""
DAMAGED = ".damaged"
"""What is put behind the name of a step that is not what was saved."""
PASSING = (
    *("RESOURCE_EXHAUSTED", "UNAVAILABLE", "DEADLINE_EXCEEDED", "ABORTED"),
    *("PERMISSION_DENIED", "UNAUTHENTICATED"),
    *map(
        os.strerror,
        (errno.EACCES, errno.EMFILE, errno.ENOMEM, errno.EIO, errno.ESTALE, errno.ETIMEDOUT),
    ),
)
"""Words of errors that say nothing of what is in a file."""
NOT_THERE = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
"""The errors of the system that do."""
CLIENTS = ("aiohttp", "gcsfs", "google", "requests", "urllib3")
"""Packages whose errors are those of a network, but for files that are not there."""
LONGEST = 300
"""Characters of an error of a library that are told, at most."""


class CheckpointError(MmpoError):
    """A checkpoint that does not belong to this run or cannot be read or written."""


class DamagedError(CheckpointError):
    """A checkpoint that is not what was saved."""


@contextlib.contextmanager
def reading(folder: str) -> Iterator[None]:
    """What reads a step, whose errors have no common type.

    Raises:
      DamagedError: what is there is not what Orbax writes.
      CheckpointError: it cannot be read for another reason, such as memory or a network.
    """
    try:
        yield
    except MmpoError:
        raise
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:  # TensorStore's own, of which Orbax makes pages
            cause = cause.__cause__
        told = (str(cause).strip().splitlines() or [type(cause).__name__])[0][:LONGEST]
        of_system = isinstance(cause, MemoryError | OSError) and not isinstance(cause, NOT_THERE)
        of_client = type(cause).__module__.partition(".")[0] in CLIENTS
        if of_system or of_client or any(word in str(cause) for word in PASSING):
            raise CheckpointError(f"{folder}: cannot be read now: {told}") from error
        raise DamagedError(f"{folder}: not a whole checkpoint: {told}") from error


@contextlib.contextmanager
def writing(folder: str, checkpoints: str) -> Iterator[None]:
    """What writes steps into a folder. Orbax tells of a full disk in whichever call comes next, as
    one of several types.

    Args:
      folder: of the steps.
      checkpoints: folder of those that a run goes on from, which may be the same.

    Raises:
      CheckpointError: this step, or the one before, cannot be written.
    """
    try:
        yield
    except MmpoError:
        raise
    except Exception as error:
        full = os.strerror(errno.ENOSPC)
        lines = str(error).strip().splitlines() or [type(error).__name__]
        reason = "the disk is full" if full in str(error) else lines[-1]
        raise CheckpointError(
            f"{folder}: a checkpoint cannot be written: {reason}; "
            f"last good checkpoint: {newest(checkpoints)}; the same command goes on from there"
        ) from error


def newest(folder: str) -> str:
    """The last step in a folder of them, for messages."""
    steps = steps_in(folder)
    return os.path.join(folder, str(steps[0])) if steps else "none was saved yet"


def read_run(folder: str) -> dict[str, Any]:
    """What a step says of its run; empty where it says nothing, as older ones of `best/`.

    Raises:
      DamagedError: it is not what was written.
    """
    with reading(folder):
        if not is_folder(os.path.join(folder, RUN)):
            return {}
        run = ocp.JsonCheckpointHandler().restore(epath.Path(folder) / RUN)
        if not isinstance(run, dict):
            raise DamagedError(f"{folder}: {RUN} holds no object")
        sealed = run.pop("sha256", None)
        if sealed is not None and sealed != fingerprint_json(run):
            raise DamagedError(f"{folder}: {RUN} is not what was written")
        return run


def check_identity(folder: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Checks that steps are of the run that finds them.

    Args:
      folder: of the steps.
      before: what the run that saved them is made of, as JSON.
      now: what this one is.

    Raises:
      CheckpointError: naming what differs.
    """
    changed = list(_changes(before, now))
    if changed:
        more = f" and {len(changed) - 5} more" if len(changed) > 5 else ""
        raise CheckpointError(
            f"{folder}: these checkpoints are of a run with another model, data or "
            f"recipe: {', '.join(changed[:5])}{more}; give another output folder or remove them"
        )


def _changes(before: Any, now: Any, name: str = "") -> Iterator[str]:
    """What differs between two JSON values, for messages: dotted names, short values with them."""
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        before, now = dict(enumerate(before)), dict(enumerate(now))
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for key in {**now, **before}:
            inner = f"{name}.{key}" if name else str(key)
            yield from _changes(before.get(key), now.get(key), inner)
    elif before != now:
        texts = [json.dumps(value) for value in (before, now)]
        short = max(map(len, texts)) < 40  # no fingerprints
        yield f"{name} ({texts[0]} there, {texts[1]} here)" if short else name


def sealed(run: Mapping[str, Any]) -> dict[str, Any]:
    """What `read_run` reads, with a digest of itself."""
    return {**run, "sha256": fingerprint_json(run)}


def checkpoint_shapes(folder: str) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of the parameters in a step, by path.

    Raises:
      DamagedError: the folder is not a whole checkpoint.
    """
    with reading(folder):
        metadata = _reader().metadata(_path(folder, PARAMS)).item_metadata
        if metadata is None:
            raise DamagedError(
                f"{folder}: not a whole checkpoint: nothing says what is in {PARAMS}"
            )
        saved = metadata.tree
        return {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in saved.items()}


def read_item(folder: str, item: str, target: Any) -> Any:
    """An item of a step in the shapes, dtypes and shardings of a target.

    A process reads what its own devices hold, and waits for no other. A mesh fills vocabularies up
    with zeros, so those of another mesh are cut off or added to.

    Raises:
      DamagedError: it is not there, or is no such item.
    """
    wanted = ocp.args.StandardRestore(target, strict=False)
    with reading(folder):
        found = _reader().restore(_path(folder, item), args=wanted)
        return jax.tree.map(_cut, found, target)


def _cut(leaf: Any, like: Any) -> Any:
    """An array of the host in the shape that it was asked for, which Orbax does not look at."""
    is_host = isinstance(leaf, np.ndarray)
    return leaf[tuple(slice(size) for size in like.shape)] if is_host else leaf


def read_items(
    folder: str, shapes: Mapping[str, Any], known: Mapping[str, Mapping[str, int]]
) -> dict[str, Any]:
    """The items of a step, which every process reads for its own devices.

    Args:
      folder: of the step.
      shapes: what each is to be.
      known: digests of the arrays of each, by path; none are known of old checkpoints.

    Raises:
      DamagedError: in all processes, where one cannot read its part, or where arrays are not those
        that were saved.
    """
    items: dict[str, Any] = {}

    def read() -> str | None:
        try:
            items.update({name: read_item(folder, name, shapes[name]) for name in shapes})
        except DamagedError as error:
            return str(error)
        return None

    for reason in in_shares(lambda own: own(), [read] * member().count):
        if reason is not None:
            raise DamagedError(reason)
    for name, tree in items.items():
        check_item(folder, name, tree, known.get(name, {}))
    return items


def check_item(folder: str, item: str, tree: Any, known: Mapping[str, int]) -> None:
    """Checks that arrays are those that were saved; all processes have to call it.

    Args:
      folder: of the step.
      item: its name.
      tree: what was read.
      known: digests by path when they were saved; none are of old checkpoints.

    Raises:
      DamagedError: naming the first that is not.
    """
    found = digests(tree) if known else {}
    wrong = [path for path, digest in known.items() if found.get(path) != digest]
    if wrong:
        more = f" and {len(wrong) - 1} more arrays" if len(wrong) > 1 else ""
        raise DamagedError(
            f"{folder}: {item}: {wrong[0]}{more}: the numbers are not those that were saved"
        )


def set_aside(folder: str, reason: str, instead: str) -> None:
    """Takes a damaged step out of the way, as training comes by it again or does without.

    Args:
      folder: of the step.
      reason: what is wrong with it, with its name.
      instead: what is taken in its place.
    """
    move(folder, folder + DAMAGED)
    log.warning(
        "%s. Passed over for %s; it is kept as %s%s, which may be removed",
        reason,
        instead,
        folder,
        DAMAGED,
    )


def steps_in(folder: str) -> list[int]:
    """Numbers of the steps in a folder of them, the newest first, whether they are whole or not."""
    names = [name for name in entries(folder) if is_number(name) and not _is_begun(folder, name)]
    return sorted(map(int, names), reverse=True)


def unfinished_in(folder: str) -> list[str]:
    """Names of what was begun to be written in a folder of steps, and not finished."""
    return [name for name in entries(folder) if _is_begun(folder, name)]


def is_number(name: str) -> bool:
    """Whether this is the name of a step."""
    return name.isdigit() and str(int(name)) == name


def _is_begun(folder: str, name: str) -> bool:
    """Whether somebody is writing there, or was killed meanwhile: on this machine a name says so,
    and in a bucket a file that is written last is missing."""
    if is_local(folder):
        return name.partition(".")[0].isdigit() and "orbax-checkpoint-tmp" in name
    path = epath.Path(folder) / name
    return is_number(name) and path.is_dir() and not ocp.utils.is_checkpoint_finalized(path)


def _path(folder: str, item: str) -> epath.Path:
    return epath.Path(absolute(folder)) / item


def _reader() -> ocp.Checkpointer:
    """What reads by itself: where Orbax's processes read together, one that fails leaves the others
    waiting."""
    own = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(primary_host=own, active_processes={own})
    return ocp.Checkpointer(ocp.StandardCheckpointHandler(), multiprocessing_options=alone)
