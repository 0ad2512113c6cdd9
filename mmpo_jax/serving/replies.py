"""Replies in OpenAI's protocol: whole ones, and streams of what becomes known."""

from __future__ import annotations

import dataclasses
import json
import secrets
import time
from typing import Any

from mmpo_jax.data.processor import Processor
from mmpo_jax.generation.engine import Asked, Part
from mmpo_jax.serving.protocol import ChatBody
from mmpo_jax.serving.texts import AnswerText, TokenTexts

DONE = b"data: [DONE]\n\n"
"""The end of a stream."""


@dataclasses.dataclass
class _Choice:
    text: AnswerText
    log_probs: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    finish: str | None = None


@dataclasses.dataclass(frozen=True)
class Delta:
    """What became known of one choice."""

    index: int
    text: str
    log_probs: list[dict[str, Any]] | None
    finish: str | None


class Reply:
    """The reply to one request as its samples come."""

    def __init__(self, body: ChatBody, asked: Asked, processor: Processor, texts: TokenTexts):
        self.body, self.texts = body, texts
        self.id = f"chatcmpl-{secrets.token_hex(16)}"
        self.created = int(time.time())
        self.prompt_tokens = len(asked.record.prompt_ids)
        self.choices = [
            _Choice(AnswerText(processor, body.stops, bool(body.stream))) for _ in range(body.n)
        ]

    @property
    def is_complete(self) -> bool:
        """Whether all choices have ended."""
        return all(choice.finish for choice in self.choices)

    def add(self, part: Part) -> Delta | None:
        """What a part makes known; None where that is nothing, as behind a stop."""
        choice = self.choices[part.number]
        if choice.finish:
            return None
        before = len(choice.text.ids)
        new = choice.text.add(part.ids, is_last=part.finish is not None)
        taken = len(choice.text.ids) - before
        choice.finish = "stop" if choice.text.is_stopped else part.finish
        log_probs = None
        if self.body.logprobs:
            log_probs = [self._log_prob(part, place) for place in range(taken)]
            choice.log_probs += log_probs
        if not (new or log_probs or choice.finish):
            return None
        return Delta(part.number, new, log_probs, choice.finish)

    def _log_prob(self, part: Part, place: int) -> dict[str, Any]:
        told = self._token(int(part.ids[place]), float(part.log_probs[place]))
        tops = zip(part.top_ids[place], part.top_log_probs[place], strict=True)
        top = [self._token(int(token), float(value)) for token, value in tops if token >= 0]
        return {**told, "top_logprobs": top[: self.body.top_logprobs or 0]}

    def _token(self, token: int, log_prob: float) -> dict[str, Any]:
        told = {"token": self.texts.text_of(token), "logprob": max(log_prob, -9999.0)}
        return {**told, "bytes": list(self.texts.bytes_of(token))}

    def whole(self) -> dict[str, Any]:
        """The reply once it is complete."""
        choices = [
            {
                "index": index,
                "message": {
                    "role": "assistant",
                    "content": choice.text.text,
                    "refusal": None,
                },
                "logprobs": self._log_probs(choice.log_probs),
                "finish_reason": choice.finish,
            }
            for index, choice in enumerate(self.choices)
        ]
        return {**self._head("chat.completion"), "choices": choices, "usage": self.usage()}

    def usage(self) -> dict[str, int]:
        """Numbers of tokens, EOS included; the prompt counts once."""
        said = sum(len(choice.text.ids) for choice in self.choices)
        total = self.prompt_tokens + said
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": said,
            "total_tokens": total,
        }

    def begin(self) -> bytes:
        """The first events of a stream: who speaks."""
        told: dict[str, Any] = {"role": "assistant", "content": ""}
        return b"".join(self._event([self._chunk(i, told)]) for i in range(self.body.n))

    def event(self, delta: Delta) -> bytes:
        """The event of what became known."""
        events = b""
        if delta.text or delta.log_probs:
            chunk = self._chunk(delta.index, {"content": delta.text})
            events += self._event([chunk | {"logprobs": self._log_probs(delta.log_probs)}])
        if delta.finish:
            chunk = self._chunk(delta.index, {})
            events += self._event([chunk | {"finish_reason": delta.finish}])
        return events

    def end(self) -> bytes:
        """The last events of a stream."""
        if self.body.includes_usage:
            return self._event([], self.usage()) + DONE
        return DONE

    def _log_probs(self, told: list[dict[str, Any]] | None) -> dict[str, Any] | None:
        return {"content": told or [], "refusal": None} if self.body.logprobs else None

    def _chunk(self, index: int, delta: dict[str, Any]) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def _event(self, choices: list[dict[str, Any]], usage: dict[str, int] | None = None) -> bytes:
        told = {**self._head("chat.completion.chunk"), "choices": choices}
        if self.body.includes_usage:
            told["usage"] = usage
        return as_event(told)

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.body.model}


def as_event(told: dict[str, Any]) -> bytes:
    """A server-sent event."""
    return b"data: " + json.dumps(told, ensure_ascii=False).encode() + b"\n\n"
