"""Stages: done ones are skipped, changed inputs run again, a kill loses at most one part."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest

from mmpo_jax.core import stages as stage_module
from mmpo_jax.core.files import fingerprint_file, write_atomic, write_table
from mmpo_jax.core.stages import Stage, StageError, read_finished, run_stage

ROOT = Path(__file__).parents[2]
LEFT = {"label.parquet", "label.json", "timings.json"}


def make(part: int) -> pa.Table:
    return pa.table({"id": [f"{part}-{row}" for row in range(3)], "score": [0.5 * part] * 3})


class Maker:
    """A `make_part` that writes down its calls and may be killed at one of them."""

    def __init__(self, kill_at: int | None = None):
        self.calls: list[int] = []
        self.kill_at = kill_at

    def __call__(self, part: int) -> pa.Table:
        if part == self.kill_at:
            raise KeyboardInterrupt
        self.calls.append(part)
        return make(part)


def a_stage(folder, **changes) -> Stage:
    fields = {"inputs": {"responses": "abc"}, "settings": {"seed": 1}, "num_parts": 4} | changes
    return Stage(folder, "label", **fields)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def whole_run(folder: Path) -> tuple[bytes, bytes]:
    run_stage(a_stage(folder), make)
    return (folder / "label.parquet").read_bytes(), (folder / "label.json").read_bytes()


@pytest.fixture
def expected(tmp_path) -> tuple[bytes, bytes]:
    return whole_run(tmp_path / "expected")


def test_result_is_all_parts_in_order(tmp_path):
    maker = Maker()
    table = run_stage(a_stage(tmp_path), maker).table
    assert maker.calls == [0, 1, 2, 3]
    assert table.equals(pa.concat_tables([make(part) for part in range(4)]))
    assert names(tmp_path) == LEFT


def test_done_stage_is_read_only(tmp_path):
    first = run_stage(a_stage(tmp_path), make)
    maker = Maker()
    assert run_stage(a_stage(tmp_path, num_parts=2), maker) == first
    assert maker.calls == []


@pytest.mark.parametrize("killed_at", range(4))
def test_kill_while_making_loses_one_part(tmp_path, expected, killed_at):
    folder = tmp_path / "run"
    first, second = Maker(killed_at), Maker()
    with pytest.raises(KeyboardInterrupt):
        run_stage(a_stage(folder), first)
    run_stage(a_stage(folder), second)
    assert first.calls + second.calls == [0, 1, 2, 3]
    assert ((folder / "label.parquet").read_bytes(), (folder / "label.json").read_bytes()) == (
        expected
    )
    assert names(folder) == LEFT


@pytest.mark.parametrize("write", range(6))
@pytest.mark.parametrize("moment", ["before", "temporary", "after"])
def test_kill_around_every_write(tmp_path, expected, monkeypatch, write, moment):
    """4 parts, the result, the manifest; the process dies without cleaning up after itself."""
    folder = tmp_path / "run"
    written = 0

    def dying_write(path, data):
        nonlocal written
        written += 1
        if written == write + 1:
            if moment == "temporary":
                path.parent.mkdir(parents=True, exist_ok=True)
                (path.parent / f".{path.name}.1-aa.tmp").write_bytes(data[:7])
            if moment == "after":
                write_atomic(path, data)
            raise KeyboardInterrupt
        write_atomic(path, data)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(stage_module, "write_atomic", dying_write)
        run_stage(a_stage(folder), make)
    maker = Maker()
    run_stage(a_stage(folder), maker)
    survived = min(4, write + (moment == "after"))
    assert maker.calls == list(range(survived, 4))
    assert ((folder / "label.parquet").read_bytes(), (folder / "label.json").read_bytes()) == (
        expected
    )
    assert names(folder) == LEFT


def test_kill_before_clean_up(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(stage_module, "_clean_up", lambda *arguments: None)
        run_stage(a_stage(tmp_path), make)
    assert len(names(tmp_path)) == 4
    maker = Maker()
    run_stage(a_stage(tmp_path), maker)
    assert maker.calls == []
    assert names(tmp_path) == LEFT


@pytest.mark.parametrize("change", [{"inputs": {"responses": "new"}}, {"settings": {"seed": True}}])
def test_changed_inputs_or_settings_run_again(tmp_path, change):
    run_stage(a_stage(tmp_path), make)
    maker = Maker()
    run_stage(a_stage(tmp_path, **change), maker)
    assert maker.calls == [0, 1, 2, 3]
    assert read_finished(a_stage(tmp_path)) is None
    assert read_finished(a_stage(tmp_path, **change)) is not None


def test_order_of_settings_does_not_matter(tmp_path):
    run_stage(a_stage(tmp_path, settings={"a": 1, "b": (2, 3)}), make)
    assert read_finished(a_stage(tmp_path, settings={"b": [2, 3], "a": 1})) is not None


@pytest.mark.parametrize("change", [{"settings": {"seed": 2}}, {"num_parts": 5}])
def test_parts_of_other_settings_are_not_used(tmp_path, change):
    with pytest.raises(KeyboardInterrupt):
        run_stage(a_stage(tmp_path), Maker(kill_at=2))
    maker = Maker()
    run_stage(a_stage(tmp_path, **change), maker)
    assert maker.calls == list(range(change.get("num_parts", 4)))
    assert names(tmp_path) == LEFT


def test_going_back_to_finished_settings_keeps_the_parts_of_others(tmp_path):
    run_stage(a_stage(tmp_path), make)
    with pytest.raises(KeyboardInterrupt):
        run_stage(a_stage(tmp_path, settings={"seed": 2}), Maker(kill_at=2))
    run_stage(a_stage(tmp_path), Maker(kill_at=0))
    maker = Maker()
    run_stage(a_stage(tmp_path, settings={"seed": 2}), maker)
    assert maker.calls == [2, 3]


def test_other_stages_in_the_folder_are_left_alone(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run_stage(Stage(tmp_path, "label-2", {}, num_parts=2), Maker(kill_at=1))
    others = names(tmp_path)
    run_stage(a_stage(tmp_path), make)
    assert names(tmp_path) == others | {"label.parquet", "label.json"}


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 8] ^= 1
    path.write_bytes(data)


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [truncate, flip, empty, Path.unlink])
def test_damaged_result_is_made_again(tmp_path, expected, caplog, damage):
    folder = tmp_path / "run"
    whole_run(folder)
    damage(folder / "label.parquet")
    assert whole_run(folder) == expected
    assert "label is made again" in caplog.text


def test_result_that_its_manifest_does_not_know_is_made_again(tmp_path, expected):
    folder = tmp_path / "run"
    whole_run(folder)
    write_table(folder / "label.parquet", make(0))
    assert whole_run(folder) == expected


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"made_of": NaN}', b"\xff\xfe"])
def test_damaged_manifest(tmp_path, expected, content):
    folder = tmp_path / "run"
    whole_run(folder)
    (folder / "label.json").write_bytes(content)
    assert whole_run(folder) == expected


@pytest.mark.parametrize("damage", [truncate, flip, empty])
def test_damaged_part_is_made_again(tmp_path, expected, caplog, damage):
    folder = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        run_stage(a_stage(folder), Maker(kill_at=3))
    damage(a_stage(folder).part_path(1))
    maker = Maker()
    run_stage(a_stage(folder), maker)
    assert maker.calls == [1, 3]
    assert "part 1 of stage label is made again" in caplog.text
    assert (folder / "label.parquet").read_bytes() == expected[0]


def test_full_disk(tmp_path, monkeypatch):
    writes = 0
    fsync = os.fsync

    def full_at_the_third(descriptor):
        nonlocal writes
        writes += 1
        if writes >= 9:  # File and folder are flushed for each part, and for what it took.
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    with monkeypatch.context() as patch, pytest.raises(StageError) as caught:
        patch.setattr(os, "fsync", full_at_the_third)
        run_stage(a_stage(tmp_path), make)
    message = str(caught.value)
    assert "stage label" in message
    assert "00002.parquet: No space left on device" in message
    assert "2 of 4 parts are finished and kept" in message
    assert names(a_stage(tmp_path).parts_folder) == {"00000.parquet", "00001.parquet"}
    maker = Maker()
    run_stage(a_stage(tmp_path), maker)
    assert maker.calls == [2, 3]


BIG_STAGE = """
import random, sys
import pyarrow as pa
from mmpo_jax.core.stages import Stage, run_stage
from mmpo_jax.core.errors import MmpoError

def make(part):
    print("made", part, flush=True)
    size = 400_000 if part == 1 else 10
    return pa.table({"x": [random.Random(part).randbytes(size)]})

try:
    run_stage(Stage(sys.argv[1], "label", {}, num_parts=2), make)
except MmpoError as error:
    print(error)
    sys.exit(3)
"""


def run_process(command: list[str]) -> subprocess.CompletedProcess:
    return subprocess.run(
        command,
        check=False,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )


def test_real_limit_on_file_size(tmp_path):
    limited = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, -1))\n"
    failed = run_process([sys.executable, "-c", limited + BIG_STAGE, str(tmp_path)])
    assert failed.returncode == 3, failed.stderr
    assert "File too large" in failed.stdout
    assert "1 of 2 parts are finished and kept" in failed.stdout
    there = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert there == {"00000.parquet", "timings.json"}
    finished = run_process([sys.executable, "-c", BIG_STAGE, str(tmp_path)])
    assert (finished.returncode, finished.stdout) == (0, "made 1\n")


def test_real_full_disk(tmp_path):
    """A file system of 200 kB, mounted in a namespace of its own where the system allows that."""
    mount = 'mount -t tmpfs -o size=200k tmpfs "$1"'
    if run_process(["unshare", "-rm", "sh", "-c", mount, "sh", str(tmp_path)]).returncode:
        pytest.skip("cannot mount a small file system here")
    script = f'{mount}; "$2" -c "$3" "$1"; echo "exit $?"; find "$1" -type f; ' + (
        'mount -o remount,size=4m "$1"; "$2" -c "$3" "$1"; echo "exit $?"'
    )
    done = run_process(
        ["unshare", "-rm", "sh", "-c", script, "sh", str(tmp_path), sys.executable, BIG_STAGE]
    )
    first, second = done.stdout.split("exit 3\n")
    assert "No space left on device. 1 of 2 parts are finished and kept" in first
    *there, made, ended = second.splitlines()
    assert {Path(path).name for path in there} == {"00000.parquet", "timings.json"}
    assert (made, ended) == ("made 1", "exit 0")


def test_errors_of_make_part_pass_through(tmp_path):
    def broken(part):
        raise FileNotFoundError("weights")

    with pytest.raises(FileNotFoundError, match="weights"):
        run_stage(a_stage(tmp_path), broken)


def test_columns_take_their_type_from_all_parts(tmp_path):
    def claims(part):
        return pa.table({"claims": [["a"]] if part else [[]], "note": ["n"] if part else [None]})

    table = run_stage(a_stage(tmp_path, num_parts=2), claims).table
    assert table.to_pydict() == {"claims": [[], ["a"]], "note": [None, "n"]}


def test_columns_have_to_agree(tmp_path):
    with pytest.raises(ValueError, match=r"part 1 has columns \['c1'\]"):
        run_stage(a_stage(tmp_path), lambda part: pa.table({f"c{part}": [1]}))


def test_manifest_says_what_the_result_is_made_of(tmp_path):
    run_stage(a_stage(tmp_path), make)
    manifest = json.loads((tmp_path / "label.json").read_text())
    assert manifest["inputs"] == {"responses": "abc"}
    assert manifest["settings"] == {"seed": 1}
    assert manifest["sha256"] == fingerprint_file(tmp_path / "label.parquet")
    assert str(tmp_path) not in json.dumps(manifest)


@pytest.mark.parametrize(
    "fields", [{"name": "a/b"}, {"name": "a.b"}, {"name": ""}, {"name": "a", "num_parts": 0}]
)
def test_impossible_stages(tmp_path, fields):
    with pytest.raises(ValueError, match="stage"):
        Stage(tmp_path, inputs={}, **fields)
