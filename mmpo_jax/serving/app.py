"""The server's routes: who is let in, what they asked, and what they are sent."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hmac
import logging
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from typing import Any

import pydantic
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from mmpo_jax.checkpoints.checkpoint import Checkpoint
from mmpo_jax.core import progress
from mmpo_jax.generation.engine import Asked, Engine, Part
from mmpo_jax.recipes.serving import Serving
from mmpo_jax.serving.prompts import Prompts
from mmpo_jax.serving.protocol import ChatBody
from mmpo_jax.serving.refusals import Refusal, of_validation
from mmpo_jax.serving.replies import Delta, Reply, as_event
from mmpo_jax.serving.texts import TokenTexts
from mmpo_jax.serving.worker import Worker

log = logging.getLogger(__name__)

BODY_SECONDS = 120.0
"""Seconds in which a body has to be there."""
READ_ANYWAY = 8
"""How often the largest body is read of a larger one, so that its client is there to be told."""
HUNG_UP = 499
"""Status of a request whose client has gone, which nobody sees; nginx's."""


@dataclasses.dataclass
class _Held:
    size: int = 0
    """Bytes of a request's body."""


class Service:
    """A checkpoint that answers requests; its methods are the event loop's."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        engine: Engine,
        serving: Serving,
        *,
        name: str,
        positions: int,
        key: str | None = None,
        gave_up: Callable[[Exception], None] = lambda error: None,
    ):
        """
        Args:
          checkpoint: with its parameters on the devices.
          engine: of the checkpoint; is used up.
          serving: limits.
          name: of the model in requests.
          positions: tokens of a prompt and its response, at most.
          key: that requests have to give; None for none.
          gave_up: is called in another thread where the devices fail again and again.
        """
        self.serving, self.name, self.key, self.positions = serving, name, key, positions
        self.processor = checkpoint.processor
        self.prompts = Prompts(self.processor, serving, positions, threading.Lock())
        self.texts = TokenTexts(self.processor)
        self.is_ending = False
        self.requests = 0
        """Requests that are not answered yet."""
        self.held_bytes = 0
        """Size of their bodies."""
        self._usual_seconds = 1.0
        self._created = int(time.time())
        self._gave_up = gave_up
        self.worker = Worker(engine, self._fail)

    def _fail(self, error: Exception) -> None:
        self.is_ending = True
        self._gave_up(error)

    @contextlib.contextmanager
    def admitted(self) -> Iterator[_Held]:
        """A request is one of those that are not answered yet.

        Raises:
          Refusal: there are enough, or the server is about to end.
        """
        if self.is_ending:
            raise Refusal(503, "the server is about to end", code="ending", retry_after=30)
        if self.requests >= self.serving.max_requests:
            raise self._busy(f"{self.requests} requests wait or are served")
        self.requests += 1
        begun, held = time.monotonic(), _Held()
        try:
            yield held
        finally:
            self.requests -= 1
            self.held_bytes -= held.size
            self._usual_seconds += 0.1 * (time.monotonic() - begun - self._usual_seconds)
            progress.advance()

    def hold(self, held: _Held, size: int) -> None:
        """So many more bytes of a request's body are there.

        Raises:
          Refusal: there is no room for them.
        """
        limit = self.serving.max_held_mb
        if self.held_bytes + size > limit * 2**20:
            raise self._busy(f"the requests that wait or are served have {limit} MiB")
        self.held_bytes += size
        held.size += size

    def _busy(self, why: str) -> Refusal:
        return Refusal(
            429,
            f"{why}; this server takes no more",
            code="too_many_requests",
            retry_after=max(1, min(60, round(self._usual_seconds))),
        )

    def check_key(self, request: Request) -> None:
        """
        Raises:
          Refusal: a key is needed, and the request has another or none.
        """
        given = request.headers.get("Authorization", "")
        if self.key and not hmac.compare_digest(given.encode(), f"Bearer {self.key}".encode()):
            raise Refusal(401, "no key, or a wrong one", code="invalid_api_key")

    def check_model(self, name: str) -> None:
        """
        Raises:
          Refusal: another model is asked for.
        """
        if name != self.name:
            raise Refusal(
                404,
                f"there is no model {name[:200]!r} here; this server has {self.name!r}",
                code="model_not_found",
                param="model",
            )

    def described(self) -> dict[str, Any]:
        """The model, as `/v1/models` has it."""
        return {
            "id": self.name,
            "object": "model",
            "created": self._created,
            "owned_by": "mmpo_jax",
            "max_model_len": self.positions,
        }

    async def deltas(self, asked: Asked, reply: Reply) -> AsyncGenerator[Delta, None]:
        """What becomes known of a request's answers until all have ended; whoever stops listening
        makes their places free.

        Raises:
          Refusal: the model or the devices fail.
        """
        loop, told = asyncio.get_running_loop(), asyncio.Queue[list[Part] | Exception]()

        def tell(parts: list[Part] | Exception) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed where the server ends
                loop.call_soon_threadsafe(told.put_nowait, parts)

        self.worker.ask(asked, tell)
        try:
            while not reply.is_complete:
                parts = await told.get()
                if isinstance(parts, Exception):
                    raise Refusal(500, f"the devices failed: {type(parts).__name__}")
                for part in parts:
                    if part.error is not None and not reply.choices[part.number].finish:
                        raise Refusal(500, str(part.error))
                    delta = reply.add(part)
                    if delta is None:
                        continue
                    if delta.finish and not part.finish:
                        self.worker.drop(asked, part.number)
                    yield delta
        finally:
            self.worker.drop(asked)


async def _chat_completions(request: Request) -> Response:
    service: Service = request.app.state.service
    service.check_key(request)
    with contextlib.ExitStack() as admission:
        held = admission.enter_context(service.admitted())
        try:
            data = await _read(request, service, held)
        except ClientDisconnect:
            return Response(status_code=HUNG_UP)
        body = _parsed(data)
        service.check_model(body.model)
        asked = await asyncio.to_thread(service.prompts.asked, body)
        reply = Reply(body, asked, service.processor, service.texts)
        if body.stream:
            return _Stream(_events(service, asked, reply), admission.pop_all())
        answer = await _unless_hung_up(request, _whole(service, asked, reply))
    return Response(status_code=HUNG_UP) if answer is None else JSONResponse(answer)


async def _read(request: Request, service: Service, held: _Held) -> bytes:
    """The body of a request.

    Raises:
      Refusal: it has more bytes than the limit, there is no room for it, or it does not come.
      ClientDisconnect: the client has gone.
    """
    limit = service.serving.max_body_mb * 2**20
    chunks, size = [], 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                size += len(chunk)
                if size <= limit:
                    service.hold(held, len(chunk))
                    chunks.append(chunk)
                elif size > READ_ANYWAY * limit:
                    break
    except TimeoutError as error:
        raise Refusal(408, f"the body did not come in {BODY_SECONDS:.0f} s") from error
    if size > limit:
        raise Refusal(413, f"the body has more than {limit} bytes", code="body_too_large")
    return b"".join(chunks)


def _parsed(data: bytes) -> ChatBody:
    """
    Raises:
      Refusal: it is no request for chat completions.
    """
    try:
        return ChatBody.model_validate_json(data)
    except pydantic.ValidationError as error:
        raise of_validation(error) from error


async def _whole(service: Service, asked: Asked, reply: Reply) -> dict[str, Any]:
    async with contextlib.aclosing(service.deltas(asked, reply)) as deltas:
        async for _ in deltas:
            pass
    return reply.whole()


async def _unless_hung_up(request: Request, answer: Any) -> Any:
    """What a coroutine gives; None where the client goes before."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = asyncio.ensure_future(answer), asyncio.ensure_future(gone())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return await tasks[0] if tasks[0].done() else None
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _events(service: Service, asked: Asked, reply: Reply) -> AsyncGenerator[bytes, None]:
    """The events of a stream; what fails in the middle is its last one."""
    yield reply.begin()
    try:
        async with contextlib.aclosing(service.deltas(asked, reply)) as deltas:
            async for delta in deltas:
                yield reply.event(delta)
        yield reply.end()
    except Refusal as refusal:
        yield as_event(refusal.body)


class _Stream(StreamingResponse):
    """Server-sent events; the request is over when they are, or when the client has gone."""

    def __init__(self, events: AsyncGenerator[bytes, None], admission: contextlib.ExitStack):
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._events, self._admission = events, admission

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        with self._admission:
            async with contextlib.aclosing(self._events):
                await super().__call__(scope, receive, send)


async def _models(request: Request) -> Response:
    service: Service = request.app.state.service
    service.check_key(request)
    if "name" in request.path_params:
        service.check_model(request.path_params["name"])
        return JSONResponse(service.described())
    return JSONResponse({"object": "list", "data": [service.described()]})


async def _health(request: Request) -> Response:
    service: Service = request.app.state.service
    status = 503 if service.is_ending else 200
    told = {"status": "ending" if service.is_ending else "ok", "requests": service.requests}
    return JSONResponse(told, status)


async def _refused(request: Request, refusal: Any) -> Response:
    return JSONResponse(refusal.body, refusal.status, refusal.headers)


async def _no_route(request: Request, error: Any) -> Response:
    told = Refusal(error.status_code, f"{request.method} {request.url.path}: {error.detail}")
    return JSONResponse(told.body, told.status, error.headers)


async def _failed(request: Request, error: Exception) -> Response:
    return JSONResponse(Refusal(500, "the server failed; its log says how").body, 500)


def make_app(service: Service) -> Starlette:
    """The application of a service."""
    app = Starlette(
        routes=[
            Route("/v1/chat/completions", _chat_completions, methods=["POST"]),
            Route("/v1/models", _models),
            Route("/v1/models/{name:path}", _models),
            Route("/health", _health),
        ],
        exception_handlers={Refusal: _refused, HTTPException: _no_route, Exception: _failed},
    )
    app.state.service = service
    return app
