"""What a chat server is asked: messages with what they show, and how the answer is sampled."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from mmpo_jax.chat.images import data_urls
from mmpo_jax.chat.server import ChatServer
from mmpo_jax.core.files import fingerprint_json
from mmpo_jax.data.records import MediaRef, VideoRef

ChatRole = Literal["system", "user", "assistant"]

OPTIONAL_FIELDS: Mapping[str, tuple[str, ...]] = {
    "response_format": ("response_format",),
    "top_logprobs": ("logprobs", "top_logprobs"),
    "seed": ("seed",),
}
"""What a request can do without where a server does not know it -> the fields of its body."""

MAX_TOKENS = "max_tokens"
"""In what is left out: the field has the newer name, `max_completion_tokens`."""


@dataclass(frozen=True)
class ChatMessage:
    """What one side says: texts, images and videos, in order."""

    role: ChatRole
    parts: tuple[str | MediaRef, ...]

    @classmethod
    def system(cls, text: str) -> ChatMessage:
        """The message that tells the model what it is for."""
        return cls("system", (text,))

    @classmethod
    def user(cls, text: str, media: Sequence[MediaRef] = ()) -> ChatMessage:
        """The message with images and videos in front, so that all questions about them share a
        prefix, which servers keep."""
        return cls("user", (*media, text))

    @classmethod
    def assistant(cls, text: str) -> ChatMessage:
        """The message that is an example of an answer."""
        return cls("assistant", (text,))


@dataclass(frozen=True)
class ChatRequest:
    """One question to a model, whatever the server."""

    messages: tuple[ChatMessage, ...]
    max_tokens: int
    """Tokens of an answer, at most."""
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    """Seed of the sampling; None leaves it to the server."""
    response_format: Mapping[str, Any] | None = field(default=None, hash=False)
    """JSON schema or the like that the answer has to keep to, as the protocol has it."""
    top_logprobs: int | None = None
    """Most probable tokens, at most, that are told of the first position; None asks for none."""
    n: int = 1
    """Answers to the same question."""
    attempt: int = 0
    """Number of this asking of the same from 0: a reply that its reader could not use is asked for
    again under the next. It is added to the seed."""

    @property
    def media(self) -> tuple[MediaRef, ...]:
        """The images and videos of all messages, in order."""
        parts = (part for message in self.messages for part in message.parts)
        return tuple(part for part in parts if not isinstance(part, str))

    def key(self, server: ChatServer) -> str:
        """SHA-256 of all that the reply depends on: server, model, messages, images and videos,
        sampling.

        Raises:
          DataError: an image or a video cannot be read.
        """
        return fingerprint_json(
            {
                "server": server.identity(),
                "messages": [
                    [message.role, [_part_identity(part) for part in message.parts]]
                    for message in self.messages
                ],
                "sampling": self._sampling(),
                "attempt": self.attempt,
            }
        )

    def body(self, server: ChatServer, left_out: Collection[str] = ()) -> bytes:
        """The body of the request, as JSON.

        Args:
          server: which is asked.
          left_out: names of `OPTIONAL_FIELDS` that the server does not know; `MAX_TOKENS` where it
            has another name for that.

        Raises:
          DataError: an image or a video cannot be sent, see `images.data_urls`.
        """
        messages = [
            {"role": message.role, "content": _content(message.parts, server)}
            for message in self.messages
        ]
        body = {"model": server.model, "messages": messages, **self.fields(server, left_out)}
        return json.dumps(body, allow_nan=False).encode()

    def fields(self, server: ChatServer, left_out: Collection[str] = ()) -> dict[str, Any]:
        """What the body has beside model and messages; as `body`."""
        return {**self._sampling(left_out), **server.extra_body}

    def optional_fields(self) -> list[str]:
        """Those of `OPTIONAL_FIELDS` that are asked for."""
        return [name for name in OPTIONAL_FIELDS if getattr(self, name) is not None]

    def _sampling(self, left_out: Collection[str] = ()) -> dict[str, Any]:
        """Fields of the body beside the messages. Some servers do not know all of them, so what
        they would do anyway is not said."""
        name = "max_completion_tokens" if MAX_TOKENS in left_out else MAX_TOKENS
        fields: dict[str, Any] = {name: self.max_tokens, "temperature": self.temperature}
        if self.top_p != 1:
            fields["top_p"] = self.top_p
        if self.n != 1:
            fields["n"] = self.n
        if self.seed is not None:
            fields["seed"] = self.seed + self.attempt
        if self.response_format is not None:
            fields["response_format"] = dict(self.response_format)
        if self.top_logprobs is not None:
            fields |= {"logprobs": True, "top_logprobs": self.top_logprobs}
        unknown = {
            field for name in OPTIONAL_FIELDS if name in left_out for field in OPTIONAL_FIELDS[name]
        }
        return {name: value for name, value in fields.items() if name not in unknown}


def _part_identity(part: str | MediaRef) -> Any:
    if isinstance(part, str):
        return part
    kind = "video" if isinstance(part, VideoRef) else "image"
    return {kind: part.fingerprint()}


def _content(parts: Sequence[str | MediaRef], server: ChatServer) -> Any:
    """A text alone is a string, which every chat template takes."""
    if len(parts) == 1 and isinstance(parts[0], str):
        return parts[0]
    return [entry for part in parts for entry in _entries(part, server)]


def _entries(part: str | MediaRef, server: ChatServer) -> list[dict[str, Any]]:
    """A text or an image as an entry of a message's content; a video as one for every frame: the
    protocol knows images alone, and servers' own entries for videos differ."""
    if isinstance(part, str):
        return [{"type": "text", "text": part}]
    detail = {} if server.image_detail is None else {"detail": server.image_detail}
    urls = data_urls(part, server.video_frames)
    return [{"type": "image_url", "image_url": {"url": url, **detail}} for url in urls]
