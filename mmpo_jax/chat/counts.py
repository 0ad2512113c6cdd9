"""What a chat client has done so far, for reports."""

from __future__ import annotations

import collections
from collections.abc import Mapping
from dataclasses import dataclass, field

from mmpo_jax.chat.replies import ChatReply, Outcome

STOPPED = "stopped"
"""Reason of a request after whose answer nothing more is asked."""


@dataclass(frozen=True)
class ChatCounts:
    """Counts of a client since it was opened."""

    sent: int = 0
    """Requests that reached the server, retries included."""
    replies: int = 0
    """Replies that were read, of this run."""
    journal_hits: int = 0
    """Requests whose outcome was in the journal when it was opened, each once."""
    retries: int = 0
    """Requests that were sent again after a failure that passes."""
    failures: Mapping[str, int] = field(default_factory=dict)
    """Requests that ended without a reply, by reason."""
    seconds: float = 0.0
    """Seconds with at least one request under way."""
    prompt_tokens: int = 0
    """Tokens of the prompts of all replies, as the server counts them."""
    completion_tokens: int = 0
    """Tokens of all replies."""
    cached_tokens: int = 0
    """Tokens of the prompts that the server still knew, where it says so."""
    models: tuple[str, ...] = ()
    """Names that the server gave the model that replied, sorted."""
    left_out: tuple[str, ...] = ()
    """Fields that the server did not know, sorted."""

    @property
    def replies_per_second(self) -> float:
        """Rate of replies while something was asked; 0 before the first."""
        return self.replies / self.seconds if self.seconds else 0.0


class Tally:
    """What a client counts as it goes; no two threads may count the same at once."""

    def __init__(self) -> None:
        self.sent = 0
        self.retries = 0
        self.known: set[str] = set()
        """Keys of requests whose outcome an earlier run has left."""
        self._replies = 0
        self._failures: collections.Counter[str] = collections.Counter()
        self._tokens: collections.Counter[str] = collections.Counter()
        self._models: set[str] = set()
        self._seconds = 0.0
        self._busy_since: float | None = None

    def ended(self, outcome: Outcome) -> None:
        """Counts the outcome of a request."""
        if not isinstance(outcome, ChatReply):
            self._failures[outcome.reason] += 1
            return
        self._replies += 1
        for name in ("prompt_tokens", "completion_tokens", "cached_tokens"):
            self._tokens[name] += getattr(outcome, name) or 0
        if outcome.model is not None:
            self._models.add(outcome.model)

    def stopped(self) -> None:
        """Counts a request whose answer stops the run."""
        self._failures[STOPPED] += 1

    def busy(self, is_busy: bool, now: float) -> None:
        """Notes whether anything is under way from now on."""
        if self._busy_since is not None:
            self._seconds += now - self._busy_since
        self._busy_since = now if is_busy else None

    def counts(self, left_out: set[str], now: float) -> ChatCounts:
        """The counts up to now."""
        running = 0.0 if self._busy_since is None else now - self._busy_since
        return ChatCounts(
            sent=self.sent,
            replies=self._replies,
            journal_hits=len(self.known),
            retries=self.retries,
            failures=dict(sorted(self._failures.items())),
            seconds=self._seconds + running,
            prompt_tokens=self._tokens["prompt_tokens"],
            completion_tokens=self._tokens["completion_tokens"],
            cached_tokens=self._tokens["cached_tokens"],
            models=tuple(sorted(self._models)),
            left_out=tuple(sorted(left_out)),
        )
