"""A language model that is asked for texts: splitters and judges do not care where it runs."""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

from jax.sharding import Mesh

from mmpo_jax.checkpoints.checkpoint import Checkpoint
from mmpo_jax.core import progress
from mmpo_jax.data.batching import fitting_lengths
from mmpo_jax.data.processor import Processor
from mmpo_jax.data.records import ImageRef, Record, Turn, VideoRef, placed
from mmpo_jax.data.skipped import UnusableRow
from mmpo_jax.data.tokenization import UNLIMITED, TokenizedRecord, tokenize
from mmpo_jax.generation.responses import generate_responses
from mmpo_jax.recipes.feedback import CheckpointAsked, Speaking
from mmpo_jax.recipes.sampling import Decoding

log = logging.getLogger(__name__)

Read = TypeVar("Read")

TRIAL = 16
"""Requests that are asked before the rest."""
SHOWN = 300
"""Characters of a reply that the log shows."""

TOO_LONG = "too_long"
UNFINISHED = "unfinished"


@dataclasses.dataclass(frozen=True)
class Ask:
    """One request for a text."""

    id: str
    """Name of what is asked about, of which samples depend."""
    text: str
    """What the user says."""
    images: tuple[ImageRef, ...] = ()
    """Images, which stand before the text."""
    videos: tuple[VideoRef, ...] = ()
    """Videos, which stand behind the images."""
    attempt: int = 0
    """How often the same was asked before."""
    max_new_tokens: int = 1024
    """Limit of the reply."""
    system: str = ""
    """What the model is told before; empty for nothing."""


@dataclasses.dataclass(frozen=True)
class Reply:
    """What came of a request."""

    text: str | None
    """What was said; None where nothing was."""
    failure: str | None = None
    """Why there is no whole text: a word that is counted."""
    detail: str = ""
    """More about the failure."""
    final: bool = False
    """Whether asking again is of no use."""
    model: str | None = None
    """Who replied, as a server calls it."""


class TextModel(Protocol):
    """Answers requests with texts."""

    def say(self, asks: Sequence[Ask], schema: Mapping[str, Any] | None = None) -> list[Reply]:
        """A reply to every request, in order.

        Args:
          asks: any number.
          schema: JSON schema of the replies, for models that can be held to one.
        """
        ...

    def reject(self, asks: Sequence[Ask], schema: Mapping[str, Any] | None = None) -> None:
        """Notes that the replies to these requests were of no use: a run that stops over them, and
        goes on later, asks anew."""
        ...

    def release(self) -> None:
        """Lets go of what it holds on the devices; asked again, it has it again."""


class UnreadableReply(Exception):
    """A reply that is not what was asked for, with the word that it is counted under."""

    def __init__(self, reason: str, detail: str):
        super().__init__(detail)
        self.reason, self.detail = reason, detail


@dataclasses.dataclass(frozen=True)
class Unread:
    """What is left of a request that got no reply which could be read."""

    reason: str
    """Why: a word that is counted."""
    detail: str
    raw: str | None
    """The last reply; None where there was none."""


def ask_until_read(
    model: TextModel,
    asks: Sequence[Ask],
    read: Callable[[int, str], Read],
    attempts: int,
    schema: Mapping[str, Any] | None = None,
) -> list[Read | Unread]:
    """What is read in the replies; unreadable ones are asked for again.

    A reply that ended at its limit gets twice the room the next time. The first few are asked
    before the rest, and where nobody can read any of them the log says so with one of the replies:
    a model that cannot do it is then not noticed hours later only.

    Args:
      model: that is asked.
      asks: the first requests.
      read: makes something of the reply to request number i; raises `UnreadableReply`.
      attempts: how often each is asked at most.
      schema: of the replies.

    Returns:
      What was read of every request, or what is left of it.
    """

    def read_later(place: int, text: str) -> Read:
        return read(TRIAL + place, text)

    first = _ask_all(model, asks[:TRIAL], read, attempts, schema)
    unread = [result for result in first if isinstance(result, Unread)]
    if len(asks) > TRIAL == len(unread):
        log.warning("%s", describe_unread(unread, f"of the first {TRIAL} replies"))
    return first + _ask_all(model, asks[TRIAL:], read_later, attempts, schema)


def describe_unread(unread: Sequence[Unread], name: str) -> str:
    """What became of replies that nobody could read: counted reasons, and the first reply."""
    reasons = Counter(one.reason for one in unread)
    told = ", ".join(f"{reason} {count}" for reason, count in reasons.items())
    shown = f"; the first: {unread[0].raw[:SHOWN]!r}" if unread[0].raw else ""
    return f"none {name} can be read ({told}){shown}"


def _ask_all(
    model: TextModel,
    asks: Sequence[Ask],
    read: Callable[[int, str], Read],
    attempts: int,
    schema: Mapping[str, Any] | None,
) -> list[Read | Unread]:
    """`ask_until_read` of requests that go out together."""
    results: list[Any] = [Unread("not_asked", "", None)] * len(asks)
    waiting = dict(enumerate(asks))
    for attempt in range(attempts):
        again: dict[int, Ask] = {}
        if not waiting:
            break
        with progress.doing(f"attempt {attempt + 1} of {attempts}"):
            replies = model.say(list(waiting.values()), schema)
        useless: list[Ask] = []
        for (place, ask), reply in zip(waiting.items(), replies, strict=True):
            results[place] = _read(place, reply, read)
            if not isinstance(results[place], Unread):
                continue
            useless.append(ask)
            if not reply.final:
                room = ask.max_new_tokens * (2 if reply.failure == UNFINISHED else 1)
                again[place] = dataclasses.replace(ask, attempt=attempt + 1, max_new_tokens=room)
        model.reject(useless, schema)  # now: another thread may stop the run before the next one
        waiting = again
    return results


def _read(place: int, reply: Reply, read: Callable[[int, str], Read]) -> Read | Unread:
    if reply.failure is not None or reply.text is None:
        return Unread(reply.failure or "empty_reply", reply.detail, reply.text)
    try:
        return read(place, reply.text)
    except UnreadableReply as error:
        return Unread(error.reason, error.detail, reply.text)


class CheckpointTextModel:
    """A checkpoint that replies through the project's own engine."""

    def __init__(
        self,
        load: Callable[[], Checkpoint],
        mesh: Mesh,
        asked: CheckpointAsked,
        speaking: Speaking,
        seed: int,
    ):
        """
        Args:
          load: gives the checkpoint, with its parameters on the mesh.
          mesh: the devices.
          asked: its section.
          speaking: how it writes.
          seed: of its samples.
        """
        self.load, self.mesh, self.asked = load, mesh, asked
        self.speaking, self.seed = speaking, seed
        self._checkpoint: Checkpoint | None = None

    def say(self, asks: Sequence[Ask], schema: Mapping[str, Any] | None = None) -> list[Reply]:
        """See `TextModel`; nothing holds a checkpoint to a schema but its prompt."""
        del schema
        replies: list[Reply] = [Reply(None)] * len(asks)
        kinds: dict[tuple[int, int], list[int]] = {}
        for place, ask in enumerate(asks):
            kinds.setdefault((ask.max_new_tokens, ask.attempt), []).append(place)
        for (max_new_tokens, attempt), places in sorted(kinds.items()):
            given = self._generate([asks[place] for place in places], max_new_tokens, attempt)
            for place, reply in zip(places, given, strict=True):
                replies[place] = reply
        return replies

    def reject(self, asks: Sequence[Ask], schema: Mapping[str, Any] | None = None) -> None:
        """Nothing: no reply is kept."""

    def release(self) -> None:
        """Forgets the checkpoint, whose arrays go where nobody else holds them."""
        self._checkpoint = None

    def _generate(self, asks: Sequence[Ask], max_new_tokens: int, attempt: int) -> list[Reply]:
        if self._checkpoint is None:
            self._checkpoint = self.load()
        checkpoint = self._checkpoint
        limit = checkpoint.model.config.decoder.position_limit
        room = UNLIMITED if limit is None else limit - max_new_tokens
        tokenized = [_tokenized(ask, checkpoint.processor, room) for ask in asks]
        records = [record for record in tokenized if isinstance(record, TokenizedRecord)]
        if not records:
            return [reply for reply in tokenized if isinstance(reply, Reply)]
        decoding = Decoding(
            temperature=self.speaking.temperature,
            top_p=self.speaking.top_p,
            max_new_tokens=max_new_tokens,
        )
        with progress.doing("replies of the model", len(records), first="compiling"):
            generated = iter(
                generate_responses(
                    checkpoint,
                    records,
                    decoding,
                    fitting_lengths(records),
                    self.mesh,
                    batch_size=self.asked.batch_size,
                    seed=self.seed,
                    round_index=attempt,
                )
            )
        replies = []
        for record in tokenized:
            if isinstance(record, Reply):
                replies.append(record)
                continue
            said = next(generated)
            failure = None if said.finished else UNFINISHED
            replies.append(Reply(said.text, failure))
        return replies


def _tokenized(ask: Ask, processor: Processor, room: int) -> TokenizedRecord | Reply:
    """The request as tokens, or the reply that it cannot have."""
    told = (Turn("system", ask.system),) if ask.system else ()
    turns = placed((*told, Turn("user", ask.text)), len(ask.images), len(ask.videos))
    record = Record(ask.id, ask.images, turns, (), ask.videos, plain_text=True)
    try:
        return tokenize(record, processor, room, 1)
    except UnusableRow as error:
        failure = TOO_LONG if error.reason.endswith("_too_long") else error.reason
        return Reply(None, failure, str(error), final=True)


def speaking_key(speaking: Speaking) -> Any:
    """What of a section replies depend on, as JSON."""
    return speaking.model_dump(mode="json", include=set(Speaking.model_fields))
