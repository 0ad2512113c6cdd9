"""Outputs: known to be writable before anything is computed, and one command's at a time."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from helpers import buckets

from mmpo_jax import cli
from mmpo_jax.core import output
from mmpo_jax.core.errors import MmpoError
from mmpo_jax.core.output import LOCK, check_writable, claimed

COMMANDS = {
    "train": {"training": {"objective": {"type": "sft"}}, "data": {"source": "picture_world"}},
    "align": {"data": {"source": "picture_world"}},
    "generate": {"data": {"source": "picture_world"}},
    "score": {"data": {"source": "picture_world"}},
    "evaluate": {"evaluation": {"type": "picture_world"}},
}

HOLDER = """
import sys, time
from mmpo_jax.core.output import claimed
with claimed(sys.argv[1], sys.argv[1].endswith(".jsonl")):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def refused(tmp_path, capsys, monkeypatch):
    """The message of a command that has to end before JAX starts."""

    def start():
        raise AssertionError("JAX is started before the output is looked at")

    monkeypatch.setattr(cli, "start_jax", start)

    def refused(command, target):
        path = tmp_path / "recipe.yaml"
        recipe = {"model": "builtin:picture_world", "output": str(target), **COMMANDS[command]}
        path.write_text(yaml.safe_dump(recipe))
        assert cli.main([command, str(path)]) == 1
        told = capsys.readouterr().err
        assert told.count("\n") == 1
        return told

    return refused


@pytest.fixture
def other():
    """Starts another process that holds an output."""
    running = []

    def other(target):
        process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(target)], stdout=subprocess.PIPE, text=True
        )
        running.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield other
    for process in running:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_what_cannot_be_written_is_found_before_anything_starts(command, refused, tmp_path):
    (tmp_path / "file").write_text("")
    assert f"output: {tmp_path}/file is a file" in refused(command, tmp_path / "file")
    inside = tmp_path / "file" / "deep" / "out"
    assert f"output: {tmp_path}/file is a file, so {inside} cannot" in refused(command, inside)
    assert sorted(os.listdir(tmp_path)) == ["file", "recipe.yaml"]


@pytest.mark.parametrize(
    ("name", "is_folder"),
    [("model", False), ("round-2", False), ("checkpoints", False), ("metrics.jsonl", True)],
)
def test_something_in_the_way(name, is_folder, refused, tmp_path):
    place = tmp_path / "out" / name
    place.mkdir(parents=True) if is_folder else (place.parent.mkdir(), place.write_text(""))
    kind = "a folder; a file" if is_folder else "a file; a folder"
    assert f"output: {place} is {kind} is to be written there" in refused("train", tmp_path / "out")


def test_something_in_the_way_of_a_file(refused, tmp_path):
    (tmp_path / "out.jsonl").mkdir()
    assert "out.jsonl is a folder; a file" in refused("generate", tmp_path / "out.jsonl")
    (tmp_path / "rows.parts").write_text("")
    (tmp_path / "other.parts").write_text("")
    assert "rows.parts is a file; a folder" in refused("score", tmp_path / "rows.jsonl")
    with claimed(str(tmp_path / "new.jsonl"), is_file=True):
        pass


def test_a_folder_that_may_not_be_written_to(refused, tmp_path, monkeypatch):
    """Root may always, so the answer of the system is made up."""
    closed = tmp_path / "closed"
    closed.mkdir()
    allowed = os.access
    monkeypatch.setattr(
        output.os, "access", lambda path, mode: str(path) != str(closed) and allowed(path, mode)
    )
    told = refused("train", closed / "run")
    assert f"output: {closed} may not be written to, so {closed}/run cannot be made" in told
    assert f"output: {closed} may not be written to" in refused("evaluate", closed)
    assert os.listdir(closed) == []


def test_converted_files(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("")
    target = tmp_path / "file" / "rows.jsonl"
    assert cli.main(["data", "convert", str(rows), str(target)]) == 1
    assert f"output: {tmp_path}/file is a file" in capsys.readouterr().err
    assert cli.main(["convert", "builtin:picture_world", str(tmp_path / "file" / "new")]) == 1
    assert f"output: {tmp_path}/file is a file" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["out", "out.jsonl"])
def test_one_command_at_a_time(name, other, tmp_path):
    """The other is named; killed, it leaves nothing that blocks the next."""
    target = tmp_path / name
    is_file = name.endswith(".jsonl")
    process = other(target)
    with (
        pytest.raises(MmpoError, match=rf"another command writes to {target}: ") as caught,
        claimed(str(target), is_file),
    ):
        pass
    host = os.uname().nodename
    assert f"process {process.pid} on {host}, since 20" in str(caught.value)
    process.send_signal(signal.SIGKILL)
    process.wait()
    with claimed(str(target), is_file):
        pass
    assert not list(tmp_path.glob("**/.*"))


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_claims_its_output(command, refused, tmp_path):
    with claimed(str(tmp_path / "out")):
        assert f"process {os.getpid()} on" in refused(command, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_outputs_are_free(tmp_path):
    with (
        claimed(str(tmp_path / "a.jsonl"), is_file=True),
        claimed(str(tmp_path / "b.jsonl"), is_file=True),
        claimed(str(tmp_path / "deep" / "folder")),
    ):
        (tmp_path / "deep" / "folder" / "kept").write_text("")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["deep", "folder", "kept"]


def test_a_folder_and_a_file_in_it_are_one_place(other, tmp_path):
    """`mmpo generate` writes `out/responses.jsonl` for `out` too; other files go on beside it."""
    inside = str(tmp_path / "out" / "responses.jsonl")
    with (
        claimed(str(tmp_path / "out")),
        pytest.raises(MmpoError, match="another command"),
        claimed(inside, is_file=True),
    ):
        pass
    process = other(tmp_path / "out" / "a.jsonl")
    with claimed(str(tmp_path / "out" / "b.jsonl"), is_file=True):
        pass
    told = rf"another command writes to {tmp_path}/out: process \d+ on"  # the last to come
    with pytest.raises(MmpoError, match=told), claimed(str(tmp_path / "out")):
        pass
    process.kill()
    process.wait()
    with claimed(str(tmp_path / "out")):
        pass
    assert not list(tmp_path.glob("out/.mmpo*"))


def test_a_converted_folder_is_claimed(other, tmp_path, capsys, monkeypatch):
    """While it is written it is one command's; a killed one leaves nothing that blocks the next."""
    monkeypatch.setattr(cli, "start_jax", lambda: None)
    target, command = tmp_path / "new", ["convert", "/nowhere", str(tmp_path / "new")]
    process = other(target)
    assert cli.main(command) == 1
    assert f"another command writes to {target}: process {process.pid}" in capsys.readouterr().err
    process.kill()
    process.wait()
    assert os.listdir(target) == [LOCK]
    assert cli.main(command) == 1
    assert "/nowhere: there is no such checkpoint folder" in capsys.readouterr().err
    rows = tmp_path / "rows.jsonl"
    other(rows)
    assert cli.main(["data", "convert", str(rows), str(rows)]) == 1
    assert f"another command writes to {rows}" in capsys.readouterr().err


def test_a_folder_that_is_replaced_while_it_is_claimed(tmp_path):
    """The lock of whoever claims the new one is not removed."""
    with claimed(str(tmp_path / "out")):
        shutil.rmtree(tmp_path / "out")
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / LOCK).write_text("another's")
    assert (tmp_path / "out" / LOCK).read_text() == "another's"


def test_without_locks_a_file_system_still_takes_outputs(tmp_path, monkeypatch, caplog):
    def none(descriptor, operation):
        raise OSError(output.errno.ENOLCK, "No locks available")

    monkeypatch.setattr(output.fcntl, "flock", none)
    with claimed(str(tmp_path / "out")):
        assert (tmp_path / "out" / LOCK).exists()
    with claimed(str(tmp_path / "rows.jsonl"), is_file=True):
        pass
    told = [record.getMessage() for record in caplog.records if "has no locks" in record.message]
    assert [tmp_path.name in line for line in told] == [True, True]
    assert len(set(told)) == 2  # once for each place
    assert list(tmp_path.iterdir()) == []


def test_a_lock_that_is_let_go_of_is_asked_for_again(tmp_path, monkeypatch):
    """Whoever shares a folder's lock holds it alone for a moment at the end."""
    flock, refusals = output.fcntl.flock, [BlockingIOError()]

    def busy(descriptor, operation):
        if refusals and operation & output.fcntl.LOCK_SH:
            raise refusals.pop()
        return flock(descriptor, operation)

    monkeypatch.setattr(output.fcntl, "flock", busy)
    with claimed(str(tmp_path / "rows.jsonl"), is_file=True):
        assert not refusals


def test_a_bucket_is_tried(monkeypatch):
    system = buckets.empty_bucket(monkeypatch)
    check_writable("gs://bucket/out")
    with claimed("gs://bucket/out"), claimed("gs://bucket/out"):
        pass
    assert not [path for path in system.store if "mmpo" in Path(path).name]

    def refuse(*args, **options):
        raise PermissionError("403: no such grant")

    monkeypatch.setattr(type(system), "_open", refuse)
    told = "gs://bucket/out cannot be written: 403"
    with pytest.raises(MmpoError, match=told), claimed("gs://bucket/out"):
        pass
