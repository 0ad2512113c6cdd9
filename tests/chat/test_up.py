"""Whether a server is up, and one that somebody knows to be gone."""

import asyncio
import threading
import time

import pytest
from helpers.chat_server import Hang, error, reply

from mmpo_jax.chat import availability
from mmpo_jax.chat.requests import ChatMessage, ChatRequest
from mmpo_jax.core.errors import MmpoError


def ask_for(text):
    return ChatRequest((ChatMessage.user(text),), 8)


def test_a_server_is_up_when_it_answers(serve, connect):
    server = serve()
    client = connect(server)
    assert client.is_up()
    server.models = None  # one without a list is up as well
    assert client.is_up()
    server.stop()
    assert not client.is_up()
    server.start()
    assert client.is_up()


def test_one_that_is_still_loading(serve, connect, monkeypatch):
    """It says so, or nothing at all."""
    server = serve()
    client = connect(server)
    answer = type(client._connection).get

    async def loading(self, path):
        found = await answer(self, path)
        return type(found)(503, error(503, "loading").body)

    monkeypatch.setattr(type(client._connection), "get", loading)
    assert not client.is_up()

    async def silent(self, path):
        await asyncio.sleep(100)

    monkeypatch.setattr(type(client._connection), "get", silent)
    monkeypatch.setattr(availability, "LOOK_SECONDS", 0.05)
    assert not client.is_up()


def test_who_asks_a_server_that_is_gone_is_told(serve, connect):
    server = serve(lambda body, seen: Hang())
    client, caught = connect(server), []

    def ask():
        try:
            client.ask([ask_for("a"), ask_for("b")])
        except MmpoError as error:
            caught.append(str(error))

    asking = threading.Thread(target=ask)
    asking.start()
    while len(server.bodies) < 2:
        time.sleep(0.005)
    client.stop(MmpoError("the command ended"))
    asking.join(10)
    assert caught == ["the command ended"]
    server.script = lambda body, seen: reply(body, "yes")
    with pytest.raises(MmpoError, match="the command ended"):
        client.ask([ask_for("c")])
    assert len(server.bodies) == 2
