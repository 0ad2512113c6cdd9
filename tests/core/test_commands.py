"""A command of the user's ends with us, whatever ends us."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest
from helpers.alive import PATIENCE, is_alive, wait_until

from mmpo_jax.core.commands import running, tail_of
from mmpo_jax.core.errors import MmpoError

SLEEPS = "import os, time; open({0!r}, 'w').write(str(os.getpid())); time.sleep(100)"
STUBBORN = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); " + SLEEPS


@pytest.fixture
def command(tmp_path):
    """Makes a command that writes the id of its process to a file and sleeps."""

    def make(code=SLEEPS, name="pid"):
        script = tmp_path / f"{name}.py"
        script.write_text(code.format(str(tmp_path / name)))
        return f'"{sys.executable}" "{script}"'

    return make


def pid_in(file):
    wait_until(lambda: file.exists() and file.read_text())
    return int(file.read_text())


def test_it_runs_as_long_as_the_block(command, tmp_path):
    with running(command(), os.environ, tmp_path / "log") as process:
        pid = pid_in(tmp_path / "pid")
        assert process.poll() is None and is_alive(pid)
        assert os.getpgid(pid) not in (os.getpgrp(), process.pid)
    assert not is_alive(pid)


def test_an_error_ends_it_too(command, tmp_path):
    with pytest.raises(KeyboardInterrupt), running(command(), os.environ, tmp_path / "log"):
        pid = pid_in(tmp_path / "pid")
        raise KeyboardInterrupt
    assert not is_alive(pid)


def test_one_that_does_not_listen_is_killed_with_all_that_it_started(command, tmp_path):
    both = f"{command(STUBBORN, 'first')} & {command(STUBBORN, 'second')}"
    began = time.monotonic()
    with running(both, os.environ, tmp_path / "log", grace=0.5):
        pids = [pid_in(tmp_path / name) for name in ("first", "second")]
    assert not any(map(is_alive, pids))
    assert time.monotonic() - began < PATIENCE


def test_one_that_listens_has_time_to_end(tmp_path):
    ends = tmp_path / "ends.py"
    ends.write_text(
        "import signal, sys, time\n"
        "def end(*_):\n"
        "    time.sleep(0.3); print('ended well', flush=True); sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, end)\n"
        f"open({str(tmp_path / 'pid')!r}, 'w').write('1')\n"
        "time.sleep(100)\n"
    )
    with running(f'"{sys.executable}" "{ends}"', os.environ, tmp_path / "log"):
        pid_in(tmp_path / "pid")
    assert tail_of(tmp_path / "log") == "ended well"


@pytest.mark.parametrize(("ends", "status"), [("exit 3", 3), ("kill -9 $$", 137), ("true", 0)])
def test_its_status_and_what_it_said(tmp_path, ends, status):
    environment = os.environ | {"MMPO_WORD": "a 'word'"}
    with running(f'echo "$MMPO_WORD"; {ends}', environment, tmp_path / "log") as process:
        assert process.wait(PATIENCE) == status
    assert tail_of(tmp_path / "log") == "a 'word'"


def test_every_start_has_its_own_part_of_the_log(tmp_path):
    log = tmp_path / "log"
    for said in ("printf first", "echo second", "true"):
        with running(said, os.environ, log) as process:
            process.wait(PATIENCE)
        assert tail_of(log) == said.partition(" ")[2]
    lines = [re.sub(r", .* UTC$", "", line) for line in log.read_text().splitlines()]
    assert lines == ["first", "--- start 2", "second", "--- start 3"]


@pytest.mark.parametrize("said", ["key: sk-0123456789\n", "sk-sk-0123456789sk-", "sk-01\nsk-0123"])
def test_its_log_has_no_secret(tmp_path, said):
    """Even where it comes in pieces; and arguments have none."""
    says = tmp_path / "says.py"
    says.write_text(
        "import os, sys, time\n"
        "for sign in sys.argv[1]:\n"
        "    os.write(1, sign.encode()); time.sleep(0.003)\n"
    )
    secret, command = "sk-0123456789", f'"{sys.executable}" "{says}" "$SAID"; exit 3'
    with running(command, os.environ | {"SAID": said}, tmp_path / "log", secret=secret) as process:
        assert secret not in " ".join(process.args)
        assert process.wait(PATIENCE) == 3
    assert (tmp_path / "log").read_text() == said.replace(secret, "[key]")


def test_a_log_that_cannot_be_written(tmp_path):
    log = tmp_path / "missing" / "log"
    told = f"{log}: no command runs whose log this is: No such file"
    with pytest.raises(MmpoError, match=re.escape(told)), running("true", os.environ, log):
        pass


def test_it_ends_with_us_also_where_its_guard_was_killed(command, tmp_path):
    with running(command(), os.environ, tmp_path / "log") as process:
        pid = pid_in(tmp_path / "pid")
        process.kill()
        process.wait()
        assert is_alive(pid)
    wait_until(lambda: not is_alive(pid))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_process_that_is_killed_leaves_no_orphan(command, tmp_path, number):
    ours = (
        "import os, time\n"
        "from mmpo_jax.core.commands import running\n"
        f"with running({command()!r}, os.environ, {str(tmp_path / 'log')!r}):\n"
        "    time.sleep(100)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", ours])
    pid = pid_in(tmp_path / "pid")
    os.kill(process.pid, number)
    process.wait()
    wait_until(lambda: not is_alive(pid))
