"""What a chat server answers: a reply, read strictly, or why there is none."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

FailureReason = Literal[
    "rate_limited",
    "server_error",
    "timed_out",
    "cut_connection",
    "malformed",
    "no_logprobs",
    "too_long",
    "refused",
    "bad_request",
    "unknown_field",
    "unreadable_image",
]
"""Why a request has no reply: limits of the server, its errors, no answer in time, a connection
that broke, a body that is not what the protocol says, one without the log-probs asked for; then
what would be the same again: more tokens than the model takes, a refusal, another error of the
request, a field that the server does not know, an image that cannot be sent."""

PASSING = frozenset(
    {"rate_limited", "server_error", "timed_out", "cut_connection", "malformed", "no_logprobs"}
)
"""Reasons that may be gone the next time."""

PERMANENT = frozenset({"too_long", "refused", "bad_request"})
"""Reasons that lie in the request, so that it need not be sent again in a later run."""

NO_LOG_PROB = -9999.0
"""What the protocol says of a token whose log-prob is below those it tells."""

MAX_RAW = 2000
"""Characters of a server's answer that a failure keeps."""

TokenLogProb = tuple[str, float]
"""A token's text and its log-prob."""


@dataclass(frozen=True)
class ChatReply:
    """The answers to one request."""

    texts: tuple[str, ...]
    """The n answers."""
    finish_reasons: tuple[str, ...]
    """Why each ends: `stop`, or `length` where it was cut."""
    first_top_logprobs: tuple[tuple[TokenLogProb, ...] | None, ...]
    """The most probable tokens of each answer's first position, and the one that was chosen, as the
    server gives them; None where none were asked for. `NO_LOG_PROB` is no probability at all."""
    model: str | None
    """The model as the server names it, which may not be the name it was asked under."""
    prompt_tokens: int | None = None
    """Tokens of the request, where the server counts them."""
    completion_tokens: int | None = None
    """Tokens of all answers, likewise."""
    cached_tokens: int | None = None
    """Tokens of the request that the server still knew, likewise."""
    left_out: tuple[str, ...] = ()
    """Fields of the request that were not sent, as the server does not know them."""


@dataclass(frozen=True)
class ChatFailure:
    """A request without a reply."""

    reason: FailureReason
    """Kind of failure, which is counted."""
    detail: str
    """What happened, for people."""
    raw: str = ""
    """Beginning of what the server answered; empty where it did not."""
    field: str | None = None
    """The field that the server does not know, of `unknown_field`."""


Outcome = ChatReply | ChatFailure


class _Malformed(ValueError):
    """Something in a body is not what the protocol says."""


def read_reply(body: Any, n: int, wants_logprobs: bool, left_out: Collection[str] = ()) -> Outcome:
    """The outcome in the body of an answer with status 200.

    Args:
      body: as JSON.
      n: answers that were asked for.
      wants_logprobs: whether log-probs were asked for; a text may be empty then.
      left_out: fields that the request was sent without.

    Returns:
      A reply that has all that was asked for, or a failure: `refused`, `no_logprobs`, `malformed`.
    """
    try:
        return _read(body, n, wants_logprobs, left_out)
    except _Malformed as error:
        return ChatFailure("malformed", str(error), brief_json(body))


def _read(body: Any, n: int, wants_logprobs: bool, left_out: Collection[str]) -> Outcome:
    choices = _get(body, "choices", list)
    if len(choices) != n:
        raise _Malformed(f"{len(choices)} choices for n = {n}")
    choices = _in_order(choices)
    for choice in choices:
        refusal = _get(choice, "message", dict).get("refusal")
        if choice.get("finish_reason") == "content_filter" or refusal:
            told = refusal if isinstance(refusal, str) else "the server's filter cut the answer"
            return ChatFailure("refused", told, brief_json(body))
    logprobs = [_first_position(choice) if wants_logprobs else None for choice in choices]
    if wants_logprobs and None in logprobs:
        return ChatFailure("no_logprobs", "no log-probs in the answer", brief_json(body))
    model = body.get("model")
    return ChatReply(
        texts=tuple(_text(choice, may_be_empty=wants_logprobs) for choice in choices),
        finish_reasons=tuple(_get(choice, "finish_reason", str) for choice in choices),
        first_top_logprobs=tuple(logprobs),
        model=model if isinstance(model, str) else None,
        left_out=tuple(sorted(left_out)),
        **_usage(body.get("usage")),
    )


def _in_order(choices: list[Any]) -> list[Any]:
    if not all(isinstance(choice, dict) for choice in choices):
        raise _Malformed("a choice is no object")
    indices: list[Any] = [choice.get("index") for choice in choices]
    if all(isinstance(index, int) for index in indices):
        if sorted(indices) != list(range(len(choices))):
            raise _Malformed(f"choices are numbered {indices}")
        return sorted(choices, key=lambda choice: choice["index"])
    return choices


def _text(choice: Mapping[str, Any], may_be_empty: bool) -> str:
    content = _get(choice, "message", dict).get("content")
    if content is None and may_be_empty:
        return ""
    if not isinstance(content, str):
        raise _Malformed(f"content is {'missing' if content is None else 'no text'}")
    if not content.strip() and not may_be_empty:
        raise _Malformed("content is empty")
    return content


def _first_position(choice: Mapping[str, Any]) -> tuple[TokenLogProb, ...] | None:
    """The tokens of the first position; None where the answer has no log-probs."""
    positions = (choice.get("logprobs") or {}).get("content")
    if not positions:
        return None
    if not isinstance(positions, list):
        raise _Malformed("logprobs.content is no list")
    chosen = _token(positions[0])
    top = positions[0].get("top_logprobs")
    tokens = (
        [] if top is None else [_token(entry) for entry in _get(positions[0], "top_logprobs", list)]
    )
    # By their texts: log-probs of the same token may differ in the last digit.
    told = any(token == chosen[0] for token, _ in tokens)
    return tuple(tokens if told else [*tokens, chosen])


def _token(entry: Any) -> TokenLogProb:
    token = _get(entry, "token", str)
    value = entry.get("logprob")
    if value is None or value == -math.inf:
        return token, NO_LOG_PROB
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise _Malformed(f"log-prob of {token!r} is {value!r}")
    return token, float(value)


def _usage(usage: Any) -> dict[str, int | None]:
    usage = usage if isinstance(usage, dict) else {}
    details = usage.get("prompt_tokens_details")
    found = {
        "prompt_tokens": usage.get("prompt_tokens"),
        "completion_tokens": usage.get("completion_tokens"),
        "cached_tokens": details.get("cached_tokens") if isinstance(details, dict) else None,
    }
    return {name: value if isinstance(value, int) else None for name, value in found.items()}


def _get(value: Any, name: str, kind: type) -> Any:
    if not isinstance(value, dict) or not isinstance(value.get(name), kind):
        raise _Malformed(f"{name} is missing or of another type")
    return value[name]


def brief_json(value: Any) -> str:
    """The beginning of a value as JSON, or of a text."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text[:MAX_RAW]


def outcome_as_json(outcome: Outcome) -> dict[str, Any]:
    """An outcome as `outcome_from_json` reads it."""
    kind = "reply" if isinstance(outcome, ChatReply) else "failure"
    return {kind: asdict(outcome)}


def outcome_from_json(value: Mapping[str, Any]) -> Outcome:
    """The outcome that was written with `outcome_as_json`: equal to it."""
    if "failure" in value:
        return ChatFailure(**value["failure"])
    fields = dict(value["reply"])
    logprobs = fields.pop("first_top_logprobs")
    for name in ("texts", "finish_reasons", "left_out"):
        fields[name] = tuple(fields[name])
    first = tuple(
        None if tokens is None else tuple((token, value) for token, value in tokens)
        for tokens in logprobs
    )
    return ChatReply(first_top_logprobs=first, **fields)
