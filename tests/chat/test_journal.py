"""What was answered is on disk at once, whole, and read back as it was."""

import errno
import os
import subprocess
import sys
import threading

import pytest
from helpers import buckets

from mmpo_jax.chat import journal as module
from mmpo_jax.chat.journal import FILE, Journal
from mmpo_jax.chat.replies import ChatFailure, ChatReply
from mmpo_jax.core.errors import MmpoError

FAILURE = ChatFailure("too_long", "HTTP 400")


def outcome(number):
    return ChatReply((f"text {number} é\n",), ("stop",), ((("Yes", -0.1 * number),),), "m", number)


def test_what_is_written_is_read_back(tmp_path):
    journal = Journal(tmp_path / "new")
    for number in range(50):
        journal.write(f"key{number}", outcome(number))
    journal.write("failed", FAILURE)
    for _ in range(2):
        assert len(journal) == 51 and "key3" in journal and "other" not in journal
        assert [journal.read(f"key{number}") for number in range(50)] == list(
            map(outcome, range(50))
        )
        assert journal.read("failed") == FAILURE and journal.read("other") is None
        journal.close()
        journal = Journal(tmp_path / "new")
    journal.close()


def test_the_first_outcome_of_a_key_stays(tmp_path):
    journal = Journal(tmp_path)
    journal.write("key", outcome(1))
    size = os.path.getsize(journal.path)
    journal.write("key", outcome(2))
    assert journal.read("key") == outcome(1) and os.path.getsize(journal.path) == size
    journal.close()


def test_a_line_that_was_cut_anywhere_is_cut_off(tmp_path):
    journal = Journal(tmp_path)
    journal.write("one", outcome(1))
    whole = os.path.getsize(journal.path)
    journal.write("two", outcome(2))
    journal.close()
    data = (tmp_path / FILE).read_bytes()
    for end in range(whole, len(data)):
        (tmp_path / FILE).write_bytes(data[:end])
        journal = Journal(tmp_path)
        assert os.path.getsize(journal.path) == whole
        assert journal.read("one") == outcome(1) and "two" not in journal
        journal.write("two", outcome(2))
        journal.close()
        assert (tmp_path / FILE).read_bytes() == data


def test_a_damaged_line_in_the_middle_is_told_and_asked_again(tmp_path, caplog):
    journal = Journal(tmp_path)
    for number in range(3):
        journal.write(f"key{number}", outcome(number))
    journal.close()
    lines = (tmp_path / FILE).read_bytes().splitlines(keepends=True)
    lines[1] = b"\0" * (len(lines[1]) - 1) + b"\n"
    (tmp_path / FILE).write_bytes(b"".join(lines))
    journal = Journal(tmp_path)
    assert "1 damaged" in caplog.text and "key1" not in journal
    journal.write("key1", outcome(1))
    assert [journal.read(f"key{number}") for number in range(3)] == list(map(outcome, range(3)))
    journal.close()


def test_what_is_forgotten_is_gone_and_can_be_written_anew(tmp_path):
    journal = Journal(tmp_path)
    for number in range(3):
        journal.write(f"{number}", outcome(number))
    journal.forget("1")
    journal.forget("1")
    journal.forget("9")
    assert "1" not in journal and journal.read("1") is None and len(journal) == 2
    journal.close()
    journal = Journal(tmp_path)
    assert "1" not in journal and len(journal) == 2
    assert journal.read("2") == outcome(2)
    journal.write("1", outcome(7))
    journal.close()
    journal = Journal(tmp_path)
    assert journal.read("1") == outcome(7) and len(journal) == 3
    journal.close()


def test_several_threads_write_and_read(tmp_path):
    journal = Journal(tmp_path)
    wrong = []

    def work(start):
        for number in range(start, start + 100):
            journal.write(f"key{number}", outcome(number))
            if journal.read(f"key{number}") != outcome(number):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(start,)) for start in (0, 50, 100, 150)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    journal.close()
    again = Journal(tmp_path)
    assert not wrong and len(again) == 250
    assert [again.read(f"key{number}") for number in range(250)] == list(map(outcome, range(250)))
    again.close()


def test_another_process_is_refused(tmp_path):
    journal = Journal(tmp_path)
    code = f"from mmpo_jax.chat.journal import Journal; Journal({os.fspath(tmp_path)!r})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode and "another process" in run.stderr
    journal.close()


def test_a_full_disk_leaves_no_half_line(tmp_path, monkeypatch):
    journal = Journal(tmp_path)
    journal.write("one", outcome(1))
    pwrite = os.pwrite

    def half(file, data, offset):
        if len(data) < 20:
            raise OSError(errno.ENOSPC, "No space left on device")
        return pwrite(file, data[: len(data) // 2], offset)

    before = (tmp_path / FILE).read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(module.os, "pwrite", half)
        with pytest.raises(OSError, match="No space") as found:
            journal.write("two", outcome(2))
    assert found.value.errno == errno.ENOSPC and found.value.filename == journal.path
    assert (tmp_path / FILE).read_bytes() == before and "two" not in journal
    journal.write("two", outcome(2))
    assert journal.read("two") == outcome(2)
    journal.close()


@pytest.fixture
def bucket(monkeypatch, tmp_path):
    """An empty bucket, and a machine that has nothing of it."""
    monkeypatch.setenv("MMPO_CACHE", str(tmp_path / "one"))
    return buckets.empty_bucket(monkeypatch)


def test_in_a_bucket(bucket, monkeypatch, tmp_path):
    """What was answered is known to another machine, and to nobody else at the same time."""
    journal = Journal("gs://bucket/journal")
    journal.write("one", outcome(1))
    with pytest.raises(MmpoError, match="another process or client"):
        Journal("gs://bucket/journal")
    journal.close()
    monkeypatch.setenv("MMPO_CACHE", str(tmp_path / "other"))
    journal = Journal("gs://bucket/journal")
    assert len(journal) == 1 and journal.read("one") == outcome(1)
    journal.forget("one")
    journal.write("two", outcome(2))
    journal.close()
    monkeypatch.setenv("MMPO_CACHE", str(tmp_path / "one"))  # where the first is left
    journal = Journal("gs://bucket/journal")
    assert len(journal) == 1 and journal.read("two") == outcome(2)
    journal.close()


def test_in_a_bucket_after_a_kill(bucket, monkeypatch):
    """What this machine has beyond the last copy is not asked again."""
    journal = Journal("gs://bucket/journal")
    journal.write("one", outcome(1))
    journal._mirror.copy()
    journal.write("two", outcome(2))
    os.close(journal._file)  # as a kill does
    journal = Journal("gs://bucket/journal")
    assert len(journal) == 2
    journal.close()
    bucket.rm_file("gs://bucket/journal/replies.jsonl")  # by who wants all asked again
    journal = Journal("gs://bucket/journal")
    assert len(journal) == 0
    journal.close()
