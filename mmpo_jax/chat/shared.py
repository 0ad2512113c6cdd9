"""A chat client for several processes: the first one asks, and all get the replies."""

from __future__ import annotations

from collections.abc import Sequence

from etils import epath

from mmpo_jax.chat.client import ChatClient
from mmpo_jax.chat.counts import ChatCounts
from mmpo_jax.chat.replies import Outcome
from mmpo_jax.chat.requests import ChatRequest
from mmpo_jax.chat.server import ChatServer
from mmpo_jax.core.errors import MmpoError
from mmpo_jax.core.processes import on_one


class SharedClient:
    """A `ChatClient` of the first process, which alone has the key and the journal. All processes
    call it alike, in their main threads."""

    def __init__(self, server: ChatServer, journal: epath.PathLike) -> None:
        """See `ChatClient`."""
        self.server = server
        self._client: ChatClient | None = None
        on_one(lambda: self._open(journal))

    def ask(self, requests: Sequence[ChatRequest]) -> list[Outcome]:
        """See `ChatClient.ask`."""
        return on_one(lambda: self._own.ask(requests))

    def check(self) -> None:
        """See `ChatClient.check`."""
        on_one(lambda: self._own.check())

    def is_up(self) -> bool:
        """See `ChatClient.is_up`."""
        return on_one(lambda: self._own.is_up())

    def stop(self, error: MmpoError) -> None:
        """See `ChatClient.stop`; of the first process, in any thread."""
        self._own.stop(error)

    def reject(self, requests: Sequence[ChatRequest]) -> None:
        """See `ChatClient.reject`."""
        if self._client is not None:
            self._client.reject(requests)

    def forget_rejected(self) -> None:
        """See `ChatClient.forget_rejected`."""
        if self._client is not None:
            self._client.forget_rejected()

    def end(self) -> None:
        """See `ChatClient.end`."""
        if self._client is not None:
            self._client.end()

    @property
    def counts(self) -> ChatCounts:
        """What was done so far, by this process."""
        return ChatCounts() if self._client is None else self._client.counts

    def close(self) -> None:
        """See `ChatClient.close`."""
        if self._client is not None:
            self._client.close()

    def _open(self, journal: epath.PathLike) -> None:
        self._client = ChatClient(self.server, journal)

    @property
    def _own(self) -> ChatClient:
        assert self._client is not None
        return self._client


AnyClient = ChatClient | SharedClient
"""The client of a command, of one process or of several."""
