"""Asking servers ahead: about what is finished, while whoever finishes it computes the rest.

What is asked ahead is what will be asked anyway, so that its replies are in the chat client's
journal when their turn comes. The stages, and what they write, know nothing of it.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

from mmpo_jax.core import progress
from mmpo_jax.core.processes import alone, is_first

log = logging.getLogger(__name__)

Item = TypeVar("Item")

AT_ONCE = 2
"""Items that are asked about together: the splitter is asked about one and the labeler about the
other."""


@contextlib.contextmanager
def asking_ahead(ask: Callable[[Item], None] | None) -> Iterator[Callable[[Item], None]]:
    """A function that takes what is finished and returns at once; `ask` is called in threads.

    Of several processes the first asks. Where that fails, as it does when a server is down, nothing
    more is asked ahead, and the log says so: who asks later asks again, and tells what is wrong. At
    the end what waits is dropped, and what is being asked goes on: that is what is needed next.
    Closing the chat clients ends it.

    Args:
      ask: asks about one item; None for nothing to be asked.
    """
    if ask is None or not is_first():
        yield lambda item: None
        return
    waiting: queue.SimpleQueue[Item | None] = queue.SimpleQueue()
    over, lock = threading.Event(), threading.Lock()

    def work() -> None:
        with progress.aside(), alone():
            while (item := waiting.get()) is not None:
                if over.is_set():
                    continue
                try:
                    ask(item)
                except Exception as error:
                    with lock:
                        is_news = not over.is_set()
                        over.set()
                    if is_news:
                        told = "%s; servers are not asked ahead any more, and again in their turn"
                        log.warning(told, error)

    for _ in range(AT_ONCE):
        threading.Thread(target=work, name="ahead", daemon=True).start()
    try:
        yield waiting.put
    finally:
        over.set()
        for _ in range(AT_ONCE):
            waiting.put(None)
