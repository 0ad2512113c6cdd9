"""Served models: chat clients of a run, and one of them as a text model."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from mmpo_jax.chat.client import ChatClient
from mmpo_jax.chat.replies import ChatFailure, Outcome
from mmpo_jax.chat.requests import ChatMessage, ChatRequest
from mmpo_jax.chat.server import ChatServer
from mmpo_jax.chat.shared import AnyClient, SharedClient
from mmpo_jax.core import progress
from mmpo_jax.core.errors import MmpoError
from mmpo_jax.core.files import fingerprint_json
from mmpo_jax.core.processes import several
from mmpo_jax.feedback.judge import TooManyFailed
from mmpo_jax.feedback.text_model import UNFINISHED, Ask, Reply
from mmpo_jax.recipes.feedback import Speaking

log = logging.getLogger(__name__)

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
        self._clients: dict[str, AnyClient] = {}

    def client(self, server: ChatServer, weights: str = "") -> AnyClient:
        """The client of a server.

        Args:
          server: its options.
          weights: fingerprint of the model that it has and how, where it may have others under that
            name at other times; each has a client and a journal.

        Raises:
          MmpoError: its key is missing, the journal cannot be used, or another section asks the
            same model otherwise.
        """
        plain = ChatServer(**{name: getattr(server, name) for name in ChatServer.model_fields})
        identity = plain.identity()
        name = fingerprint_json([identity, weights] if weights else identity)[:16]
        if name not in self._clients:
            make = SharedClient if several() else ChatClient
            self._clients[name] = make(plain, os.path.join(self.folder, name))
        client = self._clients[name]
        for option in ChatServer.model_fields:
            if getattr(plain, option) != getattr(client.server, option):
                raise MmpoError(
                    f"{plain.url}, model {plain.model}: two sections ask it, with different "
                    f"{option}; they share its connections, so give both the same"
                )
        return client

    def __enter__(self) -> Servers:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for client in self._clients.values():
            _log_counts(client)
            client.end()
            try:
                if isinstance(error, TooManyFailed):
                    client.forget_rejected()
            finally:
                client.close()


def _log_counts(client: AnyClient) -> None:
    """Says what a server was asked, if anything."""
    counts = client.counts
    if not (counts.sent or counts.journal_hits or counts.failures):
        return
    failed = ", ".join(f"{reason} {count}" for reason, count in counts.failures.items()) or "none"
    log.info(
        "%s, model %s: %d replies to %d requests, %d of them sent again; %d known before; failed: "
        "%s; %d prompt tokens (%d of them cached) and %d of replies, %.3g replies/s",
        client.server.url,
        client.server.model,
        counts.replies,
        counts.sent,
        counts.retries,
        counts.journal_hits,
        failed,
        counts.prompt_tokens,
        counts.cached_tokens,
        counts.completion_tokens,
        counts.replies_per_second,
    )


class ServedTextModel:
    """A served model that replies with texts."""

    def __init__(self, client: AnyClient, speaking: Speaking, seed: int):
        """
        Args:
          client: of the server.
          speaking: how the model writes.
          seed: of its samples, where the server knows seeds.
        """
        self.client, self.speaking, self.seed = client, speaking, seed

    def say(self, asks: Sequence[Ask], schema: Mapping[str, Any] | None = None) -> list[Reply]:
        """See `text_model.TextModel`."""
        with progress.doing(f"asking {self.client.server.model}", len(asks), "requests"):
            return [_reply(outcome) for outcome in self.client.ask(self._requests(asks, schema))]

    def reject(self, asks: Sequence[Ask], schema: Mapping[str, Any] | None = None) -> None:
        """See `text_model.TextModel`."""
        self.client.reject(self._requests(asks, schema))

    def release(self) -> None:
        """Nothing: the server has the model."""

    def _requests(self, asks: Sequence[Ask], schema: Mapping[str, Any] | None) -> list[ChatRequest]:
        return [
            ChatRequest(
                messages=(
                    *([ChatMessage.system(ask.system)] if ask.system else ()),
                    ChatMessage.user(ask.text, (*ask.images, *ask.videos)),
                ),
                max_tokens=ask.max_new_tokens,
                temperature=self.speaking.temperature,
                top_p=self.speaking.top_p,
                seed=self.seed,
                response_format=None if schema is None else _response_format(schema),
                attempt=ask.attempt,
            )
            for ask in asks
        ]


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
    return Reply(text, UNFINISHED if finish == "length" else None, model=outcome.model)
