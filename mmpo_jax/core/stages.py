"""Stages that write whole files: skipped when done, resumed part by part when killed.

A stage called ``label`` in a folder leaves two files behind:

    label.parquet                     the result
    label.json                        its manifest: inputs, settings, SHA-256 of the result
    label.parts-<key>/00003.parquet   while it runs: the parts made so far

The manifest is written last, so it never speaks of a result that is not there. The key of the
parts is a hash of everything they depend on, so parts of other settings are never mixed in. None of
these files holds a time or a path: the same inputs give the same bytes. What the stages of a folder
took is in another one, `timings.json` (see `core.timings`).
"""

import errno
import functools
import json
import logging
import os
import re
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from etils import epath

from mmpo_jax.core import progress, timings
from mmpo_jax.core.errors import DataError, MmpoError
from mmpo_jax.core.files import (
    decode_table,
    encode_table,
    fingerprint_bytes,
    fingerprint_json,
    read_bytes,
    read_table,
    write_atomic,
)
from mmpo_jax.core.processes import on_one

log = logging.getLogger(__name__)
_MANIFEST_VERSION = 1
_KEY_CHARACTERS = 16


class StageError(MmpoError):
    """A stage could not write a file. What was finished before is kept."""


@dataclass(frozen=True)
class Stage:
    """One step of a round: what it is called and everything its result depends on."""

    folder: epath.PathLike
    """Folder of its files."""
    name: str
    """Name of its files: lower-case letters, digits, ``-`` and ``_``."""
    inputs: Mapping[str, str]
    """Name -> fingerprint of each input, such as the table of the stage before."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Whatever else changes the result; has to be JSON."""
    num_parts: int = 1
    """Number of parts that the result is made in. At most one part is lost by a kill. The result
    should not depend on it, so a finished stage stays finished when it changes."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z0-9_-]+", self.name):
            raise ValueError(f"a stage cannot be called {self.name!r}")
        if self.num_parts < 1:
            raise ValueError(f"stage {self.name} cannot have {self.num_parts} parts")

    @property
    def output_path(self) -> epath.Path:
        """The result."""
        return epath.Path(self.folder) / f"{self.name}.parquet"

    @property
    def manifest_path(self) -> epath.Path:
        """What the result was made of."""
        return epath.Path(self.folder) / f"{self.name}.json"

    @property
    def key(self) -> str:
        """Of everything that the parts depend on."""
        key = fingerprint_json([dict(self.inputs), dict(self.settings), self.num_parts])
        return key[:_KEY_CHARACTERS]

    @property
    def parts_folder(self) -> epath.Path:
        """Folder in which the parts wait for each other."""
        return epath.Path(self.folder) / f"{self.name}.parts-{self.key}"

    def part_path(self, part: int) -> epath.Path:
        """The file of one part, counted from 0."""
        return self.parts_folder / f"{part:05d}.parquet"


@dataclass(frozen=True)
class StageOutput:
    """What a stage made."""

    table: pa.Table
    fingerprint: str
    """SHA-256 of its file, which is the same however often the stage was interrupted."""


def run_stage(
    stage: Stage,
    make_part: Callable[[int], pa.Table],
    finished: Callable[[pa.Table], None] = lambda rows: None,
) -> StageOutput:
    """The result of a stage, made now as far as it does not exist.

    A finished stage is read, and `make_part` not called. Otherwise the parts that are missing are
    made in order and the result is their concatenation. All parts need the same columns; a
    column that is empty or all null in one part takes its type from the others. Of several
    processes all make parts, the first reads and writes, and all get its result.

    Args:
      make_part: makes part i of `stage.num_parts`. What it raises passes through.
      finished: is given the rows of every part as soon as they are kept, those of an earlier run
        first; nothing where the stage is finished. Only the first process calls it.

    Raises:
      StageError: a file could not be written, for instance because the disk is full. Finished
        parts are kept and the next run goes on from them.
    """
    result = read_finished(stage)
    if result is not None:
        on_one(lambda: _clean_up(stage, [stage.parts_folder]))
        return result
    parts: dict[int, pa.Table] = {}
    """Parts that are there, in the process that writes."""

    def read_parts() -> set[int]:
        parts.update(_read_parts(stage))
        for part in sorted(parts):
            finished(parts[part])
        return {*parts}

    def keep(part: int, table: pa.Table, spent: Mapping[str, float]) -> None:
        data = encode_table(table)
        _write(stage, stage.part_path(part), data, len(parts))
        timings.add_time(stage.folder, stage.name, stage.key, spent)
        # Used as read back, so that the result is the same with and without a restart.
        parts[part] = decode_table(data, f"part {part} of stage {stage.name}")
        finished(parts[part])

    def finish() -> bytes:
        data = encode_table(_concatenate(stage, [parts[part] for part in range(stage.num_parts)]))
        _write(stage, stage.output_path, data, stage.num_parts)
        manifest = json.dumps(_manifest(stage, data), indent=2, sort_keys=True) + "\n"
        _write(stage, stage.manifest_path, manifest.encode(), stage.num_parts)
        _clean_up(stage, epath.Path(stage.folder).glob(f"{stage.name}.parts-*"))
        return data

    there = on_one(read_parts)
    took: dict[str, float] = {}
    for part in range(stage.num_parts):
        if part not in there:
            begun = time.perf_counter()
            table = make_part(part)
            spent = {"seconds": time.perf_counter() - begun, **_amounts(table)}
            on_one(functools.partial(keep, part, table, spent))
            took = {unit: took.get(unit, 0) + amount for unit, amount in spent.items()}
    timings.log_rates(stage.name, took)
    return _output(stage, on_one(finish))


def run_told_stage(
    stage: Stage,
    make_part: Callable[[int], pa.Table],
    finished: Callable[[pa.Table], None] = lambda rows: None,
) -> StageOutput:
    """`run_stage` as an activity that tells its parts; see there."""

    def make(part: int) -> pa.Table:
        activity.start_at(part)
        progress.tell()
        return make_part(part)

    with progress.doing(stage.name, stage.num_parts, "parts") as activity:
        return run_stage(stage, make, finished)


def read_finished(stage: Stage) -> StageOutput | None:
    """The result of a stage if it is there, whole, and made of the same inputs and settings."""
    try:
        data = on_one(lambda: _read_finished(stage))
        return None if data is None else _output(stage, data)
    except DataError as error:
        log.warning("stage %s is made again: %s", stage.name, error)
        return None


def _read_finished(stage: Stage) -> bytes | None:
    """The file of `read_finished`.

    Raises:
      DataError: it is missing or damaged.
    """
    manifest = _read_manifest(stage)
    if manifest.get("made_of") != fingerprint_json(_made_of(stage)):
        return None
    data = read_bytes(stage.output_path)
    if fingerprint_bytes(data) != manifest.get("sha256"):
        raise DataError(f"{os.fspath(stage.output_path)} is not what its manifest says")
    return data


def _output(stage: Stage, data: bytes) -> StageOutput:
    return StageOutput(decode_table(data, os.fspath(stage.output_path)), fingerprint_bytes(data))


def _amounts(table: pa.Table) -> dict[str, int]:
    """Rows of a part, and tokens where it says how many each row has, or each response of a row."""
    amounts = {"rows": table.num_rows}
    if "num_tokens" in table.column_names:
        counts = table["num_tokens"]
        if pa.types.is_list(counts.type):
            counts = pc.list_flatten(counts)
        amounts["tokens"] = pc.sum(counts).as_py() or 0
    return amounts


def _made_of(stage: Stage) -> dict[str, Any]:
    return {
        "version": _MANIFEST_VERSION,
        "stage": stage.name,
        "inputs": dict(stage.inputs),
        "settings": dict(stage.settings),
    }


def _manifest(stage: Stage, data: bytes) -> dict[str, Any]:
    made_of = _made_of(stage)
    return made_of | {"made_of": fingerprint_json(made_of), "sha256": fingerprint_bytes(data)}


def _read_manifest(stage: Stage) -> dict[str, Any]:
    """The manifest; empty where there is none or a damaged one."""
    if not stage.manifest_path.exists():
        return {}
    try:
        manifest = json.loads(read_bytes(stage.manifest_path))
    except (DataError, ValueError, RecursionError):
        manifest = None
    if isinstance(manifest, dict):
        return manifest
    name = os.fspath(stage.manifest_path)
    log.warning("stage %s is made again: %s is damaged", stage.name, name)
    return {}


def _read_parts(stage: Stage) -> dict[int, pa.Table]:
    """The finished parts by number; damaged ones count as missing."""
    parts: dict[int, pa.Table] = {}
    for part in range(stage.num_parts):
        path = stage.part_path(part)
        if not path.exists():
            continue
        try:
            parts[part] = read_table(path)
        except DataError as error:
            log.warning("part %d of stage %s is made again: %s", part, stage.name, error)
    return parts


def _concatenate(stage: Stage, parts: list[pa.Table]) -> pa.Table:
    for number, part in enumerate(parts):
        if part.column_names != parts[0].column_names:
            raise ValueError(
                f"stage {stage.name}: part {number} has columns {part.column_names}, "
                f"part 0 has {parts[0].column_names}"
            )
    return pa.concat_tables(parts, promote_options="permissive")


def _write(stage: Stage, path: epath.Path, data: bytes, finished: int) -> None:
    try:
        write_atomic(path, data)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "free some space" if full else "mend that"
        raise StageError(
            f"stage {stage.name}: cannot write {os.fspath(path)}: {error.strerror or error}. "
            f"{finished} of {stage.num_parts} parts are finished and kept: {remedy} and run the "
            "same command again, it goes on from there."
        ) from error


def _clean_up(stage: Stage, parts_folders: Iterable[epath.Path]) -> None:
    """Remove parts that are no longer needed and what killed processes left half written."""
    try:
        for folder in parts_folders:
            if folder.exists():
                folder.rmtree()
        for name in (stage.name, timings.FILE):
            for temporary in epath.Path(stage.folder).glob(f".{name}.*.tmp"):
                temporary.unlink()
    except OSError as error:  # The result is there: rubbish beside it is no reason to fail.
        log.warning("stage %s: cannot clean up: %s", stage.name, error)
