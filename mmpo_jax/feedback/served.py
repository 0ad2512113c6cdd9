"""Served models: chat clients of a run, and one of them as a text model."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from mmpo_jax.chat.client import ChatClient
from mmpo_jax.chat.counts import ChatCounts
from mmpo_jax.chat.replies import ChatFailure, Outcome
from mmpo_jax.chat.requests import ChatMessage, ChatRequest
from mmpo_jax.chat.server import ChatServer
from mmpo_jax.core.files import fingerprint_json
from mmpo_jax.feedback.text_model import UNFINISHED, Ask, Reply
from mmpo_jax.recipes.feedback import Speaking

FOLDER = "chat"
"""Folder of the journals in a run's output."""
PASSED_OVER = frozenset({"too_long", "refused", "bad_request", "unreadable_image"})
"""Failures that asking again does not change."""


class Servers:
    """The chat clients of a run, one for every server and model, each with its journal."""

    def __init__(self, folder: str):
        """
        Args:
          folder: of the run, which gets the journals.
        """
        self.folder = os.path.join(folder, FOLDER)
        self._clients: dict[str, ChatClient] = {}

    def client(self, server: ChatServer) -> ChatClient:
        """The client of a server.

        Raises:
          MmpoError: its key is missing, or the journal cannot be used.
        """
        plain = ChatServer(**{name: getattr(server, name) for name in ChatServer.model_fields})
        name = fingerprint_json(plain.identity())[:16]
        if name not in self._clients:
            self._clients[name] = ChatClient(plain, os.path.join(self.folder, name))
        return self._clients[name]

    def counts(self) -> dict[str, ChatCounts]:
        """What every model was asked, by its name."""
        return {client.server.model: client.counts for client in self._clients.values()}

    def __enter__(self) -> Servers:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for client in self._clients.values():
            client.close()


class ServedTextModel:
    """A served model that replies with texts."""

    def __init__(self, client: ChatClient, speaking: Speaking, seed: int):
        """
        Args:
          client: of the server.
          speaking: how the model writes.
          seed: of its samples, where the server knows seeds.
        """
        self.client, self.speaking, self.seed = client, speaking, seed

    def say(self, asks: Sequence[Ask], schema: Mapping[str, Any] | None = None) -> list[Reply]:
        """See `text_model.TextModel`."""
        requests = [
            ChatRequest(
                messages=(ChatMessage.user(ask.text, ask.images),),
                max_tokens=ask.max_new_tokens,
                temperature=self.speaking.temperature,
                top_p=self.speaking.top_p,
                seed=self.seed,
                response_format=None if schema is None else _response_format(schema),
                attempt=ask.attempt,
            )
            for ask in asks
        ]
        return [_reply(outcome) for outcome in self.client.ask(requests)]

    def release(self) -> None:
        """Nothing: the server has the model."""


def _response_format(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The schema as the protocol asks for it."""
    return {
        "type": "json_schema",
        "json_schema": {"name": "reply", "strict": True, "schema": dict(schema)},
    }


def _reply(outcome: Outcome) -> Reply:
    if isinstance(outcome, ChatFailure):
        final = outcome.reason in PASSED_OVER
        return Reply(None, outcome.reason, outcome.detail, final)
    (text,), (finish,) = outcome.texts, outcome.finish_reasons
    return Reply(text, UNFINISHED if finish == "length" else None)
