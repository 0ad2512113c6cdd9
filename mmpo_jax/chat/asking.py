"""One request up to its outcome: tries, waits, and what a server does not know."""

from __future__ import annotations

import asyncio
import logging
from concurrent.futures import Executor

from mmpo_jax.chat.connection import Answer, Connection, UnreachableError
from mmpo_jax.chat.counts import Tally
from mmpo_jax.chat.faults import read_error
from mmpo_jax.chat.pacing import Backoff, Outage, Pace
from mmpo_jax.chat.replies import PASSING, ChatFailure, ChatReply, Outcome, read_reply
from mmpo_jax.chat.requests import MAX_TOKENS, OPTIONAL_FIELDS, ChatRequest
from mmpo_jax.chat.server import ChatServer
from mmpo_jax.core.errors import DataError, MmpoError

log = logging.getLogger(__name__)

UNREADABLE = frozenset({"malformed", "no_logprobs"})
"""Failures of answers that came but could not be used."""

UNREADABLE_RETRIES = 2
"""How often, at most, a request is sent again after those."""

PROBE_SECONDS = 5.0
"""Seconds between two tries to connect, at most."""


class Asker:
    """Asks a server one request at a time, many at once; what it learns of the server counts for
    all of them. It belongs to one event loop."""

    def __init__(
        self,
        server: ChatServer,
        connection: Connection,
        backoff: Backoff,
        tally: Tally,
        encoders: Executor,
    ) -> None:
        """
        Args:
          server: the options.
          connection: to the server.
          backoff: waits between tries.
          tally: where requests and retries are counted.
          encoders: threads that read and encode images and videos.
        """
        self.left_out: set[str] = set()
        """Fields that the server does not know."""
        self._server = server
        self._connection = connection
        self._backoff = backoff
        self._tally = tally
        self._encoders = encoders
        name = f"chat server {server.url}"
        self._pace = Pace(name, server.max_concurrent, backoff)
        self._outage = Outage(name, server.max_outage)

    async def answer(self, request: ChatRequest) -> Outcome:
        """The reply to a request, or why it has none after all tries.

        Raises:
          MmpoError: no request can succeed, see `faults.read_error`; or the server is out of reach
            for too long.
        """
        retries = {True: 0, False: 0}
        """By whether an answer came that could not be used."""
        while True:
            left_out = frozenset(self.left_out)
            try:
                body = await self._encode(request, left_out)
            except DataError as error:
                return ChatFailure("unreadable_image", str(error))
            outcome, wait = await self._ask(request, body, left_out)
            if isinstance(outcome, ChatReply):
                self._pace.replied()
                return outcome
            if self._does_without(outcome.field, left_out):
                continue
            unreadable, most = outcome.reason in UNREADABLE, self._server.max_retries
            if unreadable:
                most = min(most, UNREADABLE_RETRIES)
            if outcome.reason not in PASSING or retries[unreadable] >= most:
                return outcome
            retries[unreadable] += 1
            self._tally.retries += 1
            await asyncio.sleep(max(self._backoff.seconds(retries[unreadable]), wait))

    async def _encode(self, request: ChatRequest, left_out: frozenset[str]) -> bytes:
        if not request.media:
            return request.body(self._server, left_out)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._encoders, request.body, self._server, left_out)

    async def _ask(
        self, request: ChatRequest, body: bytes, left_out: frozenset[str]
    ) -> tuple[Outcome, float]:
        """(outcome of sending it once, seconds that the server asks to wait)."""
        answer, sent = await self._reach(body)
        if isinstance(answer, ChatFailure):
            return answer, 0.0
        if answer.status == 200:
            missed = [name for name in request.optional_fields() if name in left_out]
            wants_logprobs = request.top_logprobs is not None and "top_logprobs" not in missed
            return read_reply(answer.body, request.n, wants_logprobs, missed), 0.0
        fields = request.fields(self._server, left_out)
        failure = read_error(self._server, answer.status, answer.body, fields)
        wait = answer.retry_after or 0.0
        if wait > self._server.max_outage:
            raise self._error(f"it asks to wait {wait:.0f} s ({failure.detail})")
        if failure.reason == "rate_limited":
            now = asyncio.get_running_loop().time()
            self._pace.rate_limited(sent, now, wait)
            if self._pace.limited_for(now) > self._server.max_outage:
                raise self._error(f"it answers nothing but rate limits ({failure.detail})")
        return failure, wait

    def _error(self, what: str) -> MmpoError:
        """The error of a server that is of no use for too long."""
        server = self._server
        limit = f"longer than max_outage, {server.max_outage:g} s"
        return MmpoError(f"{server.url}, model {server.model}: {what}; {limit}")

    async def _reach(self, body: bytes) -> tuple[Answer | ChatFailure, float]:
        """(what the server answers once it can be reached, when it was sent that)."""
        loop = asyncio.get_running_loop()
        tries = 0
        while True:
            try:
                async with self._pace.turn():
                    sent = loop.time()
                    answer = await self._connection.post("chat/completions", body)
            except UnreachableError as error:
                if self._outage.failed(loop.time(), str(error)):
                    raise self._error(f"it cannot be reached ({error})") from error
                tries += 1
                await asyncio.sleep(min(PROBE_SECONDS, self._backoff.seconds(tries)))
                continue
            self._outage.over(loop.time())
            self._tally.sent += 1
            return answer, sent

    def _does_without(self, field: str | None, left_out: frozenset[str]) -> bool:
        """Whether a request may be sent again without a field that the server does not know."""
        if field in left_out or not (field in OPTIONAL_FIELDS or field == MAX_TOKENS):
            return False
        assert field is not None
        if field not in self.left_out:
            self.left_out.add(field)
            log.warning(
                "%s, model %s: the server does not know %s; it is asked %s from here on",
                self._server.url,
                self._server.model,
                field,
                "with max_completion_tokens" if field == MAX_TOKENS else "without",
            )
        return True
