import contextlib

import pytest
from helpers.chat_server import ChatTestServer

from mmpo_jax.chat.client import ChatClient
from mmpo_jax.chat.pacing import Backoff
from mmpo_jax.chat.server import ChatServer

QUICK = Backoff(first=0.005, longest=0.02)


@pytest.fixture
def serve():
    """Makes servers that stop with the test."""
    with contextlib.ExitStack() as stack:
        yield lambda *args, **options: stack.enter_context(ChatTestServer(*args, **options))


@pytest.fixture
def connect(tmp_path):
    """Makes clients of servers, all with one journal, that are closed with the test."""
    with contextlib.ExitStack() as stack:

        def connect(server, backoff=QUICK, **options):
            section = ChatServer(url=server.url, model="judge", **options)
            return stack.enter_context(ChatClient(section, tmp_path / "journal", backoff))

        yield connect
