"""`mmpo serve` as a process: how it starts, is told to end, and ends."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading

import pytest

pytest.importorskip("uvicorn", reason="needs pip install 'mmpo_jax[serve]'")

import httpx2
from helpers.served import body, picture, user

from mmpo_jax import cli


@pytest.fixture(scope="module")
def served_process(tmp_path_factory):
    """(the process, its URL)."""
    command = [sys.executable, "-m", "mmpo_jax.cli", "serve", "--model", "builtin:picture_world"]
    command += ["--port", "0", "--api-key-env", "SERVED_KEY", "--name", "shapes"]
    environment = os.environ | {"SERVED_KEY": "a-long-key", "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    log = tmp_path_factory.mktemp("served") / "log"
    with (
        log.open("w") as file,
        subprocess.Popen(command, stderr=file, stdout=subprocess.PIPE, env=environment) as process,
    ):
        try:
            while (found := re.search(r"shapes is served at (\S+)", log.read_text())) is None:
                assert process.poll() is None, log.read_text()
                threading.Event().wait(0.1)
            yield process, found[1], log
        finally:
            process.kill()


@pytest.mark.slow
def test_told_to_end_it_answers_who_asked(served_process):
    process, url, log = served_process
    asked = body(user("describe the picture .", picture(0)), n=16, temperature=3, max_tokens=900)
    headers = {"Authorization": "Bearer a-long-key"}
    with httpx2.stream(
        "POST",
        f"{url}/chat/completions",
        json=asked | {"model": "shapes", "stream": True},
        headers=headers,
        timeout=120,
    ) as reply:
        events = reply.iter_lines()
        next(events)
        process.send_signal(signal.SIGTERM)
        told = [line.removeprefix("data: ") for line in events if line]
    assert told[-1] == "[DONE]"
    choices = [choice for line in told[:-1] for choice in json.loads(line)["choices"]]
    assert sum(choice["finish_reason"] is not None for choice in choices) == 16
    assert process.wait(60) == 0
    assert "told to end" in log.read_text() and "a-long-key" not in log.read_text()
    with pytest.raises(httpx2.ConnectError):
        httpx2.get(f"{url}/models")


def test_an_address_that_is_taken(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert cli.main(["serve", "--model", "builtin:picture_world", "--port", port]) == 1
    assert f"serving.port {port}: Address already in use" in capsys.readouterr().err


def test_what_is_missing_is_named(capsys, monkeypatch):
    monkeypatch.delenv("NO_KEY_HERE", raising=False)
    serve = ["serve", "--model", "builtin:picture_world"]
    assert cli.main([*serve, "--api-key-env", "NO_KEY_HERE"]) == 1
    assert "the environment variable NO_KEY_HERE has no key in it" in capsys.readouterr().err
    assert cli.main([*serve, "--api-key-env", "sk-a-key-itself"]) == 1
    told = capsys.readouterr().err
    assert "serving.api_key_env" in told and "sk-a-key-itself" not in told
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert cli.main(serve) == 1
    assert "pip install 'mmpo_jax[serve]'" in capsys.readouterr().err
