"""One exchange with a chat server over HTTP, without tries and without waiting."""

from __future__ import annotations

import asyncio
import json
import os
import ssl
import time
from dataclasses import dataclass
from typing import Any

import httpx2

from mmpo_jax.chat.faults import retry_after
from mmpo_jax.chat.replies import ChatFailure
from mmpo_jax.chat.server import ChatServer, hide_key, read_key
from mmpo_jax.core.errors import MmpoError

CONNECT_TIMEOUT = 10.0
"""Seconds to wait for a connection: a server that is up takes it at once, whatever it computes."""

KEPT_OPEN = 4.0
"""Seconds that a connection is kept without use: less than the 5 after which uvicorn, the HTTP
server of vLLM and SGLang, closes it, as a request could cross with that."""


class UnreachableError(Exception):
    """No connection could be made; nothing was sent."""


@dataclass(frozen=True)
class Answer:
    """What a server sent back."""

    status: int
    """Status of HTTP."""
    body: Any
    """As JSON, or the text where it is none; without the key, if the server repeated it."""
    retry_after: float | None = None
    """Seconds that the server asks to wait."""


class Connection:
    """Connections to a server, kept open between requests. It belongs to one event loop."""

    def __init__(self, server: ChatServer) -> None:
        """
        Raises:
          MmpoError: the key is missing, see `read_key`.
        """
        self._server = server
        self._key = read_key(server)
        headers = {"content-type": "application/json"}
        if self._key is not None:
            headers["authorization"] = f"Bearer {self._key}"
        self._http = httpx2.AsyncClient(
            headers=headers,
            timeout=httpx2.Timeout(None, connect=min(CONNECT_TIMEOUT, server.timeout)),
            limits=httpx2.Limits(max_connections=None, keepalive_expiry=KEPT_OPEN),
        )

    async def close(self) -> None:
        """Closes what is open."""
        await self._http.aclose()

    async def post(self, path: str, body: bytes) -> Answer | ChatFailure:
        """What the server answers to a body of JSON, or how that failed.

        Raises:
          UnreachableError: no connection could be made.
          MmpoError: the server's certificate is not one to trust.
        """
        return await self._exchange(self._http.build_request("POST", self._url(path), content=body))

    async def get(self, path: str) -> Answer | ChatFailure:
        """What the server answers to a question without a body; as `post`."""
        return await self._exchange(self._http.build_request("GET", self._url(path)))

    def _url(self, path: str) -> str:
        return f"{self._server.url}/{path}"

    async def _exchange(self, request: httpx2.Request) -> Answer | ChatFailure:
        seconds = self._server.timeout
        try:
            async with asyncio.timeout(seconds):
                response = await self._http.send(request)
        except (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.ProxyError) as error:
            if found := _cause(error, ssl.SSLCertVerificationError):
                told = f"{self._server.url}: its certificate cannot be trusted: {found}"
                raise MmpoError(told) from error
            raise UnreachableError(_why(error)) from error
        except (TimeoutError, httpx2.TimeoutException):
            return ChatFailure("timed_out", f"no answer within {seconds:g} s")
        except httpx2.TransportError as error:
            return ChatFailure("cut_connection", _why(error))
        except httpx2.DecodingError as error:
            return ChatFailure("malformed", f"the body cannot be decompressed: {error}")
        waits = retry_after(response.headers.get("retry-after"), time.time())
        return Answer(response.status_code, hide_key(_parse(response.content), self._key), waits)


def _parse(content: bytes) -> Any:
    """JSON, or the text where it is none. Halves of characters, which JSON may hold and no file
    can, become question marks."""
    try:
        value = json.loads(content)
        halves = b"\\ud" in content.lower()
        return json.loads(_as_utf8(json.dumps(value, ensure_ascii=False))) if halves else value
    except (ValueError, RecursionError):
        return content.decode(errors="replace")


def _as_utf8(text: str) -> bytes:
    return text.encode(errors="replace")


def _cause(error: BaseException, kind: type[BaseException]) -> BaseException | None:
    """The innermost error of a kind that led to an error, itself included."""
    found: BaseException | None = None
    current: BaseException | None = error
    while current is not None:
        found = current if isinstance(current, kind) else found
        current = current.__cause__ or current.__context__
    return found


def _why(error: BaseException) -> str:
    """An error for people: what the system says of it, if it does."""
    system = _cause(error, OSError)
    if isinstance(system, ConnectionError) and system.errno:
        return os.strerror(system.errno)  # asyncio writes a text of its own into it
    told = system.strerror if isinstance(system, OSError) else None
    return told or str(error) or type(error).__name__
