"""What a status other than 200 means: what passes, what lies in the request, what stops the run.

The bodies are those of OpenAI, vLLM (also the flat ones of older versions), SGLang and FastAPI.
"""

from __future__ import annotations

import email.utils
import json
import math
import re
from collections.abc import Iterable
from typing import Any

from mmpo_jax.chat.replies import ChatFailure, FailureReason, brief_json
from mmpo_jax.chat.requests import MAX_TOKENS, OPTIONAL_FIELDS
from mmpo_jax.chat.server import ChatServer
from mmpo_jax.core.errors import MmpoError

NO_MONEY = frozenset({"insufficient_quota", "billing_hard_limit_reached", "insufficient_balance"})
"""Codes and types of errors that no waiting mends."""

TOO_LONG = re.compile(
    r"context.?(length|window|size|limit)|max_model_len|maximum (context|model|prompt|input) length"
    r"|too many (input |prompt )?tokens|reduce the length|prompt (is )?too long",
    re.I,
)
REFUSED = re.compile(
    r"content.?filter|content management policy|content_policy_violation|safety system"
    r"|ResponsibleAIPolicyViolation",
    re.I,
)
UNKNOWN = (
    r"unrecognized|unknown|unsupported|unexpected|extra inputs|extra_forbidden|extra fields"
    r"|not permitted|not allowed|not supported|n.t support|additional propert"
)
"""How servers say that they do not take a field."""
NEAR = 80
"""Characters between a field's name and that, at most."""

MAX_TOLD = 300
"""Characters of a server's words in a message."""

Error = tuple[str, frozenset[str], str | None]
"""What an error's body says: message, its codes and types, the parameter at fault."""


def read_error(
    server: ChatServer, status: int, body: Any, fields: Iterable[str] = ()
) -> ChatFailure:
    """The failure that an answer with an error status is.

    Args:
      server: that was asked.
      status: of HTTP, not 200.
      body: as JSON, or a text where it is none.
      fields: of the request beside model and messages.

    Raises:
      MmpoError: no request can succeed: the key, the model, the address, the account.
    """
    message, codes, parameter = parse_error(body)
    told = f"HTTP {status}: {message[:MAX_TOLD]}" if message else f"HTTP {status}"
    if status == 402 or (status == 429 and codes & NO_MONEY):
        raise _stop(server, f"the account has no money or quota left ({told})")
    if status in (401, 403):
        name = server.api_key_env
        hint = f"look at the key in {name}" if name else "name the key with api_key_env"
        raise _stop(server, f"the server does not let us in ({told}); {hint}")
    if status in (404, 405) or 300 <= status < 400:
        hint = "" if server.url.endswith("/v1") else " (that of most servers ends in /v1)"
        tried = f"{server.url}/chat/completions"
        raise _stop(server, f"{tried} is not found ({told}); look at url{hint} and model")
    reason, field = _reason(status, message, codes, parameter, fields)
    return ChatFailure(reason, told, brief_json(body), field)


def _reason(
    status: int, message: str, codes: frozenset[str], parameter: str | None, fields: Iterable[str]
) -> tuple[FailureReason, str | None]:
    """(reason, the unknown field if that is it)."""
    if status == 429:
        return "rate_limited", None
    if status == 408:
        return "timed_out", None
    if status == 409 or (status >= 500 and status != 501):
        return "server_error", None
    said = " ".join([message, *codes])
    if TOO_LONG.search(said):
        return "too_long", None
    if REFUSED.search(said):
        return "refused", None
    field = unknown_field(said, parameter, fields)
    return ("bad_request", None) if field is None else ("unknown_field", field)


def _stop(server: ChatServer, what: str) -> MmpoError:
    return MmpoError(f"{server.url}, model {server.model}: {what}")


def parse_error(body: Any) -> Error:
    """What the body of an error says; the message may be empty."""
    error = body
    if isinstance(body, dict):
        error = next((body[name] for name in ("error", "detail") if body.get(name)), body)
    if isinstance(error, str):
        return error.strip(), frozenset(), None
    if not isinstance(error, dict):
        return json.dumps(error), frozenset(), None
    codes = {str(error[name]) for name in ("code", "type") if isinstance(error.get(name), str)}
    message, parameter = error.get("message"), error.get("param")
    return (
        message if isinstance(message, str) else json.dumps(error),
        frozenset(codes),
        parameter if isinstance(parameter, str) else None,
    )


def unknown_field(said: str, parameter: str | None, fields: Iterable[str]) -> str | None:
    """The field that a server says it does not take; None where it says something else.

    Args:
      said: its message and codes.
      parameter: that it names as the one at fault.
      fields: of the request, the only ones it can mean.

    Returns:
      A name of `OPTIONAL_FIELDS` or `MAX_TOKENS`, which a client can do without, or another field.
    """
    fields = sorted(fields, key=len, reverse=True)
    if parameter in fields and re.search(UNKNOWN, said, re.I):
        return _as_option(str(parameter))
    for field in fields:
        # `n` alone is a letter of many things.
        name = rf"(?<!\w){re.escape(field)}(?!\w)" if len(field) > 1 else rf"['\"`]{field}['\"`]"
        near = rf"{name}.{{0,{NEAR}}}?({UNKNOWN})|({UNKNOWN}).{{0,{NEAR}}}?{name}"
        if re.search(near, said, re.I | re.S):
            return _as_option(field)
    return None


def _as_option(field: str) -> str:
    """The name under which a client leaves a field out."""
    for option, fields in OPTIONAL_FIELDS.items():
        if field in fields:
            return option
    return MAX_TOKENS if field == MAX_TOKENS else field


def retry_after(value: str | None, now: float) -> float | None:
    """Seconds that a `Retry-After` header asks to wait: a number, or a date of HTTP.

    Args:
      value: of the header; None where there is none.
      now: seconds since the epoch.

    Returns:
      At least 0; None where the header says nothing that can be read.
    """
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - now
        except ValueError:
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None
