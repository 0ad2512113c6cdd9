"""How fast a server is asked: back-off, concurrency after a rate limit, and outages."""

from __future__ import annotations

import logging
import random
from dataclasses import dataclass

log = logging.getLogger(__name__)

JITTER = 0.25
"""Share of a wait that is random, so that those who failed together do not come back together."""

RECOVERY = 0.2
"""By how much each reply raises the concurrency again after a rate limit."""

TOLD_EVERY = 10.0
"""Seconds between two lines of the log about one outage."""


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
    """How many requests may be under way, and from when on."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.resumes = 0.0
        """Time from which requests are sent again, on the clock of the loop."""
        self._limit = float(most)
        self._lowered = -1.0

    @property
    def limit(self) -> int:
        """Requests at a time, at most: at least 1."""
        return int(self._limit)

    def rate_limited(self, sent: float, now: float, wait: float) -> None:
        """Halves the concurrency, once for all that were sent before it was halved last.

        Args:
          sent: when the request was sent that the server had too many of.
          now: on the same clock.
          wait: seconds that the server asks all to wait; 0 where it does not say.
        """
        if sent >= self._lowered:
            self._limit = max(1.0, self._limit / 2)
            self._lowered = now
        self.resumes = max(self.resumes, now + wait)

    def replied(self) -> None:
        """Raises the concurrency a little."""
        self._limit = min(self.most, self._limit + RECOVERY)


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
