"""The key reaches the server, and nothing else."""

import logging
import os

import pytest
from helpers.chat_server import error, question, reply

from mmpo_jax.chat.client import ChatClient
from mmpo_jax.chat.pacing import Backoff
from mmpo_jax.chat.requests import ChatMessage, ChatRequest
from mmpo_jax.chat.server import HIDDEN, ChatServer
from mmpo_jax.core.errors import MmpoError

KEY = "sk-0123456789abcdef+/="


def everything_below(folder):
    return "".join(path.read_text() for path in folder.rglob("*") if path.is_file())


def script(body, seen):
    """A server that tells everybody the key."""
    text = question(body)
    if text == "bad":
        return error(400, f"no image for {KEY}")
    if text == "later" and not seen:
        return error(500, f"Bearer {KEY}")
    return reply(body, f"you are {KEY}", model=f"of {KEY}")


def test_the_key_is_nowhere(serve, tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("JUDGE_KEY", KEY)
    server = serve(script, key=KEY)
    section = ChatServer(url=server.url, model="judge", api_key_env="JUDGE_KEY", max_retries=1)
    requests = [ChatRequest((ChatMessage.user(text),), 8) for text in ("bad", "later", "a")]
    with ChatClient(section, tmp_path, Backoff(0.001, 0.001)) as client:
        client.check()
        outcomes = client.ask(requests)
        shown = [section, client, client.counts, client._connection, client._asker, outcomes]
        assert client.counts.replies == 2
    assert outcomes[2].texts == (f"you are {HIDDEN}",)
    assert KEY not in repr(shown) + caplog.text + everything_below(tmp_path)
    assert "JUDGE_KEY" in repr(section) and os.listdir(tmp_path)


def test_a_wrong_key_is_not_told_either(serve, tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("JUDGE_KEY", KEY)
    server = serve(key="another")
    section = ChatServer(url=server.url, model="judge", api_key_env="JUDGE_KEY")
    with ChatClient(section, tmp_path) as client:
        for ask in (client.check, lambda: client.ask([ChatRequest((), 8)])):
            with pytest.raises(MmpoError, match="JUDGE_KEY") as found:
                ask()
            assert HIDDEN in str(found.value)  # the server repeats what it was given
            assert KEY not in f"{found.value!r} {found.getrepr(showlocals=False)}"
    assert KEY not in caplog.text + everything_below(tmp_path)
