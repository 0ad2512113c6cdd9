"""The process of a server: its socket, its start, and its end once it is told to."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
from collections.abc import Callable, Iterator

import uvicorn
from starlette.applications import Starlette

from mmpo_jax.core import progress
from mmpo_jax.core.errors import MmpoError
from mmpo_jax.serving.app import Service

log = logging.getLogger(__name__)

QUIET = 4.0
"""Seconds between two looks at whether anybody is served, while nothing is said."""
KEEP_ALIVE = 30
"""Seconds for which an idle connection stays open."""


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
      MmpoError: the address is taken, or none of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=512)
    except (OSError, OverflowError) as error:
        told = getattr(error, "strerror", None) or str(error)
        raise MmpoError(f"serving.host {host}, serving.port {port}: {told}") from error


def address(listening: socket.socket) -> str:
    """The URL in front of `/chat/completions`."""
    host, port = listening.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leaves signals to `run_server`: uvicorn would raise them again at its end."""
        yield


def run_server(
    app: Starlette, service: Service, listening: socket.socket, until: Callable[[], bool]
) -> None:
    """Serves until SIGTERM or Ctrl-C comes, and until the requests of then are answered.

    Args:
      app: of `make_app`.
      service: is told when the server is about to end.
      listening: closed at the end.
      until: says whether to end without a signal.
    """
    asyncio.run(_run(app, service, listening, until))


async def _run(
    app: Starlette, service: Service, listening: socket.socket, until: Callable[[], bool]
) -> None:
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    server = _Server(
        uvicorn.Config(
            app,
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE,
            timeout_graceful_shutdown=service.serving.drain_seconds,
        )
    )

    def end() -> None:
        if service.is_ending:
            server.force_exit = True
            return
        log.info("told to end; %d requests are still answered", service.requests)
        service.is_ending = server.should_exit = True

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, end)
    watching = asyncio.create_task(_watch(service, server, until))
    try:
        await server.serve(sockets=[listening])
    finally:
        watching.cancel()


async def _watch(service: Service, server: uvicorn.Server, until: Callable[[], bool]) -> None:
    """Keeps the log quiet while nobody asks, and ends the server that cannot go on."""
    while True:
        if not service.requests:
            progress.spoken()
        if until():
            server.should_exit = True
        await asyncio.sleep(min(QUIET, progress.SILENCE / 2))


def key_of(name: str | None) -> str | None:
    """The key that clients have to give, from the environment; None where none is needed.

    Raises:
      MmpoError: the variable is not set.
    """
    if name is None:
        return None
    key = os.environ.get(name, "").strip()
    if not key:
        raise MmpoError(f"serving.api_key_env: the environment variable {name} has no key in it")
    return key
