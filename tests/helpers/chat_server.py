"""A chat-completions server for the tests, on this machine, that fails as it is told to.

What a request gets is up to a function: `script(body, seen)` gives an answer or a fault for the
body of a request that was seen `seen` times before. Without one, `says(messages)` gives the text.
"""

from __future__ import annotations

import base64
import collections
import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

os.environ.setdefault("NO_PROXY", "127.0.0.1")

Body = dict[str, Any]
LogProbs = Sequence[tuple[str, float]]


@dataclass(frozen=True)
class Answer:
    """What is sent back: JSON, or bytes as they are."""

    body: Any
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    delay: float = 0.0
    """Seconds before it is sent."""


@dataclass(frozen=True)
class Hang:
    """Nothing is sent, until the client has left or the server stops."""


@dataclass(frozen=True)
class Cut:
    """The connection ends in the middle of an answer."""

    after: int = 20
    """Bytes of the body that are sent; with 0 nothing at all is."""


Result = Answer | Hang | Cut
Script = Callable[[Body, int], Result]


def reply(
    body: Body,
    texts: str | Sequence[str | None] | None,
    top: LogProbs | None = None,
    *,
    model: str | None = None,
    finish: str = "stop",
    usage: Mapping[str, Any] | None = None,
    delay: float = 0.0,
) -> Answer:
    """The answer of a server that works.

    Args:
      body: of the request.
      texts: one for all n choices, or one for each; None is no content.
      top: tokens of the first position, the most probable first; told if the request asks.
      model, finish, usage: as in the protocol.
      delay: seconds.
    """
    texts = [texts] * body.get("n", 1) if isinstance(texts, str | None) else texts
    tokens = [{"token": token, "logprob": value, "bytes": None} for token, value in top or ()]
    position = None
    if tokens and body.get("logprobs"):
        position = {**tokens[0], "top_logprobs": tokens[: body["top_logprobs"]]}
    choices = [
        {
            "index": place,
            "message": {"role": "assistant", "content": text},
            "finish_reason": finish,
            "logprobs": {"content": [position]} if position else None,
        }
        for place, text in enumerate(texts)
    ]
    model = body["model"] if model is None else model
    usage = {"prompt_tokens": 7, "completion_tokens": 3} if usage is None else usage
    return Answer(
        {"object": "chat.completion", "model": model, "choices": choices, "usage": usage},
        delay=delay,
    )


def error(status: int, message: str, *, retry_after: str | None = None, **fields: Any) -> Answer:
    """An error as vLLM and OpenAI say it."""
    headers = {} if retry_after is None else {"Retry-After": retry_after}
    return Answer({"error": {"message": message, **fields}}, status, headers)


def question(body: Body) -> str:
    """The texts of the last message."""
    content = body["messages"][-1]["content"]
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part["type"] == "text")


def images(body: Body) -> list[tuple[str, bytes]]:
    """(mime type, bytes) of all images, which have to be data URLs."""
    parts = [
        part
        for message in body["messages"]
        if not isinstance(message["content"], str)
        for part in message["content"]
        if part["type"] == "image_url"
    ]
    found = []
    for part in parts:
        head, _, data = part["image_url"]["url"].partition(";base64,")
        assert head.startswith("data:") and data, head[:40]
        found.append((head.removeprefix("data:"), base64.b64decode(data, validate=True)))
    return found


def echo(messages: Sequence[Mapping[str, Any]]) -> str:
    return "You said: " + question({"messages": messages})


class ChatTestServer:
    """A server on a port of its own, which it keeps when it stops and starts again."""

    def __init__(
        self,
        script: Script | None = None,
        says: Callable[[Sequence[Mapping[str, Any]]], str] = echo,
        models: Sequence[str] | None = ("judge",),
        key: str | None = None,
        port: int = 0,
    ) -> None:
        """
        Args:
          script: what each request gets; a reply with what it `says` by default.
          says: text for the messages of a request.
          models: that it lists; None for a server without a list.
          key: that requests have to bring; None for any.
          port: of this machine; 0 for a free one.
        """
        self.script = script or (lambda body, seen: reply(body, says(body["messages"])))
        self.models = models
        self.key = key
        self.bodies: list[Body] = []
        """Bodies of all requests, in the order in which they came."""
        self.times: list[float] = []
        """When they came, on the monotonic clock."""
        self.most_at_once = 0
        """Requests under way together, at most; may be set back to 0."""
        self.at_once = 0
        self._seen: collections.Counter[str] = collections.Counter()
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._sockets: set[socket.socket] = set()
        self._http: ThreadingHTTPServer | None = None
        self._port = port
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}/v1"

    @property
    def questions(self) -> collections.Counter[str]:
        """How often each question came."""
        return collections.Counter(question(body) for body in self.bodies)

    def start(self) -> None:
        self._stopped.clear()
        handler = type("Handler", (_Handler,), {"owner": self})
        self._http = _HTTPServer(("127.0.0.1", self._port), handler)
        self._port = self._http.server_address[1]
        serve = self._http.serve_forever
        threading.Thread(target=serve, args=(0.01,), daemon=True).start()

    def stop(self) -> None:
        """Dies: all connections are cut, and new ones refused."""
        if self._http is None:
            return
        self._stopped.set()
        self._http.shutdown()
        self._http.server_close()
        self._http = None
        with self._lock:
            for connection in self._sockets:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> ChatTestServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    # What the handlers use ----------------------------------------------------------------------

    def result(self, body: Body) -> Result:
        """Counts a request; what the script gives it."""
        with self._lock:
            text = json.dumps(body, sort_keys=True)
            seen = self._seen[text]
            self._seen[text] += 1
            self.bodies.append(body)
            self.times.append(time.monotonic())
        return self.script(body, seen)

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        with self._lock:
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            yield
        finally:
            with self._lock:
                self.at_once -= 1

    @contextlib.contextmanager
    def connected(self, connection: socket.socket) -> Iterator[None]:
        with self._lock:
            self._sockets.add(connection)
        try:
            yield
        finally:
            with self._lock:
                self._sockets.discard(connection)

    def wait(self, seconds: float | None) -> None:
        """Waits, but not longer than the server lives."""
        self._stopped.wait(seconds)


class _HTTPServer(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, *_: object) -> None:
        """Clients leave in the middle; that is what is tested."""


class _Handler(BaseHTTPRequestHandler):
    owner: ChatTestServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def handle(self) -> None:
        with self.owner.connected(self.connection):
            super().handle()

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        models = self.owner.models
        if self.path != "/v1/models" or models is None:
            self._send(error(404, "Not Found"))
        elif self._is_let_in():
            self._send(Answer({"object": "list", "data": [{"id": name} for name in models]}))

    def do_POST(self) -> None:
        data = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path != "/v1/chat/completions":
            self._send(error(404, "Not Found"))
            return
        with self.owner.counted():
            if not self._is_let_in():
                return
            result = self.owner.result(json.loads(data))
            if isinstance(result, Hang):
                self.owner.wait(None)
                self.close_connection = True
            elif isinstance(result, Cut):
                self._cut(result)
            else:
                self.owner.wait(result.delay)
        if isinstance(result, Answer):
            self._send(result)

    def _is_let_in(self) -> bool:
        key = self.owner.key
        given = self.headers.get("Authorization")
        if key is None or given == f"Bearer {key}":
            return True
        # As careless as some servers are.
        self._send(error(401, f"Incorrect API key provided: {given}", code="invalid_api_key"))
        return False

    def _cut(self, fault: Cut) -> None:
        if fault.after:
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b'{"choices": [{"message":'.ljust(fault.after)[: fault.after])
        self.close_connection = True

    def _send(self, answer: Answer) -> None:
        is_raw = isinstance(answer.body, bytes)
        data = answer.body if is_raw else json.dumps(answer.body).encode()
        self.send_response(answer.status)
        self.send_header("Content-Type", "text/plain" if is_raw else "application/json")
        self.send_header("Content-Length", str(len(data)))
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)
