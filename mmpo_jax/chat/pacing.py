"""How fast a server is asked: back-off, concurrency after a rate limit, and outages."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import logging
import random
from collections.abc import AsyncIterator
from dataclasses import dataclass

log = logging.getLogger(__name__)

JITTER = 0.25
"""Share of a wait that is random, so that those who failed together do not come back together."""

RECOVERY = 0.2
"""By how much each reply raises the concurrency again after a rate limit."""

TOLD_EVERY = 10.0
"""Seconds between two lines of the log about one outage."""

TOLD_WAIT = 5.0
"""Seconds of a wait that the log tells, at least."""


@dataclass(frozen=True)
class Backoff:
    """Waits between tries, each twice as long as the one before."""

    first: float = 0.5
    """Seconds before the first retry."""
    longest: float = 30.0
    """Seconds, at most."""

    def seconds(self, retry: int) -> float:
        """Seconds to wait before a retry, numbered from 1; by chance up to a quarter less."""
        wait = min(self.longest, self.first * 2.0 ** min(retry - 1, 30))
        return wait * (1 - JITTER * random.random())


class Pace:
    """How many requests may be under way, and from when on; of one event loop.

    A rate limit makes everybody wait: as long as the server asks, or else longer every time until
    a reply comes. So each request meets a limit a few times only, however long it lasts. Then half
    as many go on.
    """

    def __init__(self, name: str, most: int, backoff: Backoff) -> None:
        """
        Args:
          name: of the server, for the log.
          most: requests at a time.
          backoff: waits after rate limits where the server does not say.
        """
        self.name = name
        self.most = most
        self._backoff = backoff
        self._limit = float(most)
        self._under_way = 0
        self._queue: collections.deque[asyncio.Future[None]] = collections.deque()
        """Who waits for a place."""
        self._timer: asyncio.TimerHandle | None = None
        """What lets them go on after a pause."""
        self._resumes = 0.0
        self._lowered = -1.0
        self._limited, self._limited_since = 0, 0.0
        """Rate limits since the last reply, and when the first was."""

    @property
    def limit(self) -> int:
        """Requests at a time, at most: at least 1."""
        return int(self._limit)

    @contextlib.asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Holds one of the places of requests under way; callers get them in order."""
        place = asyncio.get_running_loop().create_future()
        self._queue.append(place)
        self._give_places()
        try:
            await place
            yield
        finally:
            if place.done() and not place.cancelled():
                self._under_way -= 1
            self._give_places()

    def rate_limited(self, sent: float, now: float, wait: float) -> None:
        """Halves the concurrency and makes all wait, once for requests that were sent together.

        Args:
          sent: when the request was sent that the server had too many of.
          now: on the same clock, that of the loop.
          wait: seconds that the server asks to wait; 0 where it does not say.
        """
        if sent >= self._lowered:
            self._limit = max(1.0, self._limit / 2)
            self._lowered = now
            self._limited_since = self._limited_since if self._limited else now
            self._limited += 1
            wait = wait or self._backoff.seconds(self._limited)
            if wait >= TOLD_WAIT:
                told = "%s has too many requests; waiting %.0f s, then %d at a time"
                log.warning(told, self.name, wait, self.limit)
        self._resumes = max(self._resumes, now + wait)

    def replied(self) -> None:
        """Raises the concurrency a little."""
        self._limited = 0
        self._limit = min(self.most, self._limit + RECOVERY)

    def limited_for(self, now: float) -> float:
        """Seconds for which the server has answered with nothing but rate limits."""
        return now - self._limited_since if self._limited else 0.0

    def _give_places(self) -> None:
        loop = asyncio.get_running_loop()
        pause = self._resumes - loop.time()
        while self._queue and pause <= 0 and self._under_way < self.limit:
            place = self._queue.popleft()
            if not place.done():  # who left has cancelled it
                self._under_way += 1
                place.set_result(None)
        if self._queue and pause > 0 and self._timer is None:
            self._timer = loop.call_later(pause, self._after_pause)

    def _after_pause(self) -> None:
        self._timer = None
        self._give_places()


class Outage:
    """How long a server has been out of reach."""

    def __init__(self, name: str, longest: float) -> None:
        self.name = name
        self.longest = longest
        """Seconds until it is `over_long`."""
        self.tries = 0
        """Connections that failed since it began."""
        self._began: float | None = None
        self._told = 0.0

    def failed(self, now: float, why: str) -> bool:
        """Counts a connection that failed; says so at times. Whether the outage is too long."""
        self.tries += 1
        if self._began is None:
            self._began = self._told = now
            log.warning("%s cannot be reached: %s; trying again", self.name, why)
        lasted = now - self._began
        if now - self._told >= TOLD_EVERY:
            self._told = now
            log.warning("%s cannot be reached for %.0f s, of %.0f", self.name, lasted, self.longest)
        return lasted >= self.longest

    def over(self, now: float) -> None:
        """The server answers."""
        if self._began is not None:
            log.warning("%s answers again after %.0f s", self.name, now - self._began)
        self._began, self.tries = None, 0
