"""Whether a chat server is there, has the model, and takes a request at all."""

from __future__ import annotations

import asyncio
import contextlib
import logging

from mmpo_jax.chat.connection import Answer, Connection, UnreachableError
from mmpo_jax.chat.faults import read_error
from mmpo_jax.chat.replies import ChatFailure
from mmpo_jax.chat.requests import ChatMessage, ChatRequest
from mmpo_jax.chat.server import ChatServer
from mmpo_jax.core.errors import MmpoError

log = logging.getLogger(__name__)

MODELS_SHOWN = 20
"""Names of models that a message lists, at most."""

LOOK_SECONDS = 10.0
"""Seconds that a server has to show that it is up."""

PROBE = ChatRequest((ChatMessage.user("Say yes."),), max_tokens=16)
"""What a server is asked to see whether it replies at all."""


async def is_up(connection: Connection) -> bool:
    """Whether the server answers now, and with more than that it cannot yet."""
    try:
        async with asyncio.timeout(LOOK_SECONDS):
            answer = await connection.get("models")
    except (UnreachableError, TimeoutError):
        return False
    return isinstance(answer, Answer) and answer.status < 500


async def check(
    server: ChatServer, connection: Connection, left_out: frozenset[str], proven: bool
) -> None:
    """Looks whether the server is there and has the model; warns where it has no list of models.

    Args:
      server: the options.
      connection: to the server.
      left_out: fields that it does not know.
      proven: whether it has replied before; if not, one without a list is asked for a word.

    Raises:
      MmpoError: the server cannot be reached, does not let us in, or has other models.
    """
    url, model = server.url, server.model
    try:
        answer = await connection.get("models")
    except UnreachableError as error:
        raise MmpoError(f"{url}: the chat server cannot be reached: {error}") from error
    if isinstance(answer, ChatFailure):
        raise MmpoError(f"{url}: the chat server does not answer: {answer.detail}")
    if answer.status in (401, 402, 403):
        read_error(server, answer.status, answer.body)  # which raises
    try:
        names = [entry["id"] for entry in answer.body["data"]]
    except (TypeError, KeyError):
        if not proven:
            await _try_address(server, connection, left_out)
        told = f"{url}: the server has no list of its models (HTTP %d); going on without"
        log.warning(told, answer.status)
        return
    if model not in names:
        shown = ", ".join(map(str, names[:MODELS_SHOWN])) or "none"
        more = f" and {len(names) - MODELS_SHOWN} more" if len(names) > MODELS_SHOWN else ""
        raise MmpoError(f"{url}: the server has no model {model}; it has {shown}{more}")


async def _try_address(
    server: ChatServer, connection: Connection, left_out: frozenset[str]
) -> None:
    """Asks for one word. How that fails does not matter here, but for what no request can succeed
    after.

    Raises:
      MmpoError: see `faults.read_error`.
    """
    with contextlib.suppress(UnreachableError):
        answer = await connection.post("chat/completions", PROBE.body(server, left_out))
        if isinstance(answer, Answer) and answer.status != 200:
            read_error(server, answer.status, answer.body)
