"""Processes that work on parts: each a fresh interpreter that is asked over its pipes.

Nothing of the parent is copied, so its threads and devices do not matter, and the program that the
parent runs is not run again, as `multiprocessing` would do.
"""

from __future__ import annotations

import collections
import contextlib
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, BinaryIO, TypeVar

from mmpo_jax.core import processes
from mmpo_jax.core.errors import MmpoError

AHEAD = 2
"""Parts that wait for a worker, beside those that are worked on."""

Result = TypeVar("Result")


class WorkerError(MmpoError):
    """A worker ended before its time."""


class _Worker:
    """One process."""

    def __init__(self) -> None:
        # The parent alone has the devices.
        paths = os.pathsep.join(filter(None, sys.path))
        environment = {**os.environ, "PYTHONPATH": paths, "JAX_PLATFORMS": "cpu"}
        for name in processes.VARIABLES:  # a worker is no process of the command
            environment.pop(name, None)
        environment.setdefault("TOKENIZERS_PARALLELISM", "false")
        self.process = subprocess.Popen(
            [sys.executable, "-c", f"from {__name__} import serve; serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
        )

    def call(self, function: Callable[..., Result], arguments: tuple[Any, ...]) -> Result:
        """What the function gives in the process; what it raises is raised."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            pickle.dump((function, arguments), self.process.stdin, pickle.HIGHEST_PROTOCOL)
            self.process.stdin.flush()
            fine, value = pickle.load(self.process.stdout)
        except (EOFError, BrokenPipeError) as error:
            code = self.process.wait()
            told = "it was killed, perhaps for want of memory" if code < 0 else f"exit code {code}"
            raise WorkerError(
                f"a worker process ended before its work was done: {told}; finished parts are kept"
            ) from error
        if not fine:
            raise value
        return value

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()


def in_order(
    function: Callable[..., Result], arguments: Iterable[tuple[Any, ...]], workers: int
) -> Iterator[Result]:
    """The results of a function, in the order of its arguments.

    Args:
      function: of a module that can be imported; it and its arguments are pickled.
      arguments: of each call; few of them are taken before their results are asked for.
      workers: processes, which begin when the first arguments come.

    Raises:
      WorkerError: a process ended.
    """
    idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
    begun: list[_Worker] = []
    lock = threading.Lock()

    def call(given: tuple[Any, ...]) -> Result:
        worker = _take(idle, begun, lock, workers)
        try:
            return worker.call(function, given)
        finally:
            idle.put(worker)

    pool = ThreadPoolExecutor(workers, thread_name_prefix="worker")
    waiting: collections.deque[Future[Result]] = collections.deque()
    try:
        for given in arguments:
            waiting.append(pool.submit(call, given))
            if len(waiting) >= workers + AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()
        for worker in begun:
            worker.close()
        pool.shutdown()


def _take(
    idle: queue.SimpleQueue[_Worker], begun: list[_Worker], lock: threading.Lock, most: int
) -> _Worker:
    """A worker that has nothing to do; a new one while there are fewer than the most."""
    with contextlib.suppress(queue.Empty):
        return idle.get_nowait()
    with lock:
        if len(begun) < most:
            begun.append(_Worker())
            return begun[-1]
    return idle.get()


def serve() -> None:
    """The life of a worker: calls, until the pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it too, and ends its workers
    requests: BinaryIO = os.fdopen(os.dup(0), "rb")
    replies: BinaryIO = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever prints must not get among the replies
    while True:
        try:
            function, arguments = pickle.load(requests)
        except EOFError:
            return
        try:
            reply = pickle.dumps((True, function(*arguments)), pickle.HIGHEST_PROTOCOL)
        except BaseException as error:
            reply = _refusal(error)
        replies.write(reply)
        replies.flush()


def _refusal(error: BaseException) -> bytes:
    """A reply that raises the error, or one of its words where it cannot be sent."""
    if not isinstance(error, MmpoError):
        error.add_note("in a worker process:\n" + "".join(traceback.format_exception(error)))
    with contextlib.suppress(Exception):
        reply = pickle.dumps((False, error), pickle.HIGHEST_PROTOCOL)
        pickle.loads(reply)
        return reply
    return pickle.dumps((False, WorkerError(f"{type(error).__name__}: {error}")))
