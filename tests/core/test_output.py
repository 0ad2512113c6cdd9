"""Outputs: known to be writable before anything is computed, and one command's at a time."""

import os
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
    "train": {"training": {"objective": {"type": "sft"}}, "data": {"source": "shapes"}},
    "align": {"data": {"source": "shapes"}},
    "generate": {"data": {"source": "shapes"}},
    "score": {"data": {"source": "shapes"}},
    "evaluate": {},
}

HOLDER = """
import sys, time
from mmpo_jax.output import claimed
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
        recipe = {"model": "builtin:shapes", "output": str(target), **COMMANDS[command]}
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
    assert cli.main(["convert", "builtin:shapes", str(tmp_path / "file" / "new")]) == 1
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


def test_without_locks_a_file_system_still_takes_outputs(tmp_path, monkeypatch):
    def none(descriptor, operation):
        raise OSError(output.errno.ENOLCK, "No locks available")

    monkeypatch.setattr(output.fcntl, "flock", none)
    with claimed(str(tmp_path / "out")):
        assert (tmp_path / "out" / LOCK).exists()


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
