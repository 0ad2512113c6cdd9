"""`mmpo align` with served judges, killed at ten moments: every start sends what is missing alone,
and the end is that of an undisturbed run."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from helpers.chat_server import ChatTestServer
from helpers.served_rounds import MODELS, Feedback, journal_keys, result_files, served_recipe

KILLS = 10
AT_ONCE = 4
PATIENCE = 300
"""Seconds after which a run counts as hung."""


def start(recipe, folder):
    """`mmpo align` as a process group of its own."""
    file = folder / f"{os.path.basename(recipe.output)}.yaml"
    file.write_text(json.dumps(recipe.model_dump(mode="json")))  # which is YAML too
    return subprocess.Popen(
        [sys.executable, "-m", "mmpo_jax.cli", "align", os.fspath(file)],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def run(recipe, folder):
    process = start(recipe, folder)
    said, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, said[-3000:]


def kill_when(recipe, folder, is_time):
    """Starts, and kills the whole group as soon as `is_time()`."""
    process = start(recipe, folder)
    deadline = time.monotonic() + PATIENCE
    try:
        while not is_time():
            assert process.poll() is None, process.communicate()[0][-3000:]
            assert time.monotonic() < deadline
            time.sleep(0.002)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@pytest.mark.slow
def test_killed_at_ten_moments(tiny_folder, tmp_path):
    with ChatTestServer(models=MODELS) as server:
        server.script = first = Feedback({})
        options = {"server": {"max_concurrent": AT_ONCE}}
        undisturbed = served_recipe(tmp_path / "undisturbed", tiny_folder, server.url, **options)
        run(undisturbed, tmp_path)
        requests = len(first.right)
        assert set(first.right.values()) == {1}

        server.script = script = Feedback({}, delay=0.02)
        recipe = served_recipe(tmp_path / "killed", tiny_folder, server.url, **options)
        output, kept, sent = tmp_path / "killed", set(), 0
        for number in range(KILLS):
            moment = (number + 1) * requests // (KILLS + 1)
            kill_when(recipe, tmp_path, lambda moment=moment: len(script.right) >= moment)
            known = journal_keys(output)
            assert len(set(known)) == len(known) and set(known) > kept
            # What was under way at the kill, of splitter and labeler, may be lost; no more.
            assert len(known) >= len(script.right) - 2 * AT_ONCE
            assert sum(script.right.values()) - sent <= requests - len(kept)
            kept, sent = set(known), sum(script.right.values())
        run(recipe, tmp_path)
    assert sum(script.right.values()) - sent == requests - len(kept)
    assert script.right.keys() == first.right.keys()
    assert result_files(output) == result_files(tmp_path / "undisturbed")
