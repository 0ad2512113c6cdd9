"""A run that is killed at any moment goes on: only what is missing is sent again."""

import os
import subprocess
import sys
import time

import pytest
from helpers.chat_server import question, reply

from mmpo_jax.chat.journal import FILE, Journal

REQUESTS = 120

RUN = """
import sys
from mmpo_jax.chat.client import ChatClient
from mmpo_jax.chat.requests import ChatMessage, ChatRequest
from mmpo_jax.chat.server import ChatServer

url, journal, count = sys.argv[1:]
with ChatClient(ChatServer(url=url, model="judge", max_concurrent=4), journal) as client:
    requests = [ChatRequest((ChatMessage.user(f"{n}"),), 8) for n in range(int(count))]
    print([outcome.texts[0] for outcome in client.ask(requests)], client.counts.journal_hits)
"""


def start(server, journal):
    command = [sys.executable, "-c", RUN, server.url, os.fspath(journal), f"{REQUESTS}"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("half_line", [False, True])
def test_a_run_that_is_killed(serve, tmp_path, half_line):
    server = serve(lambda body, seen: reply(body, question(body) * 50, delay=0.01))
    for replies in (1, 30, 90):
        process = start(server, tmp_path)
        while sum(server.questions.values()) < replies:
            assert process.poll() is None
            time.sleep(0.002)
        process.kill()
        process.communicate()
        if half_line:
            with open(tmp_path / FILE, "ab") as file:
                file.write(b'{"key": "0123", "reply": {"texts": ["')
    journal = Journal(tmp_path)
    kept = len(journal)
    journal.close()
    sent = len(server.bodies)
    # Of every run at most what was under way is not in the journal.
    assert REQUESTS > kept >= sent - 3 * 4
    process = start(server, tmp_path)
    told, _ = process.communicate()
    assert process.returncode == 0
    assert told.strip() == f"{[f'{n}' * 50 for n in range(REQUESTS)]} {kept}"
    assert len(server.bodies) == sent + REQUESTS - kept
    assert len(server.questions) == REQUESTS
