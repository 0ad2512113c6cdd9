"""The options of a chat server, and the key that it is asked with."""

from __future__ import annotations

import os
import re
from typing import Any, Literal
from urllib.parse import urlsplit

import pydantic
from pydantic import Field
from pydantic_core import PydanticCustomError

from mmpo_jax.core.errors import MmpoError
from mmpo_jax.core.files import canonical_json
from mmpo_jax.core.guard import HIDDEN
from mmpo_jax.core.sections import SECRET, KeyVariable, PositiveInt, Section

REQUEST_FIELDS = frozenset(
    {
        "model",
        "messages",
        "stream",
        "n",
        "max_tokens",
        "max_completion_tokens",
        "temperature",
        "top_p",
        "seed",
        "response_format",
        "logprobs",
        "top_logprobs",
    }
)
"""Fields of a request's body that the client writes itself."""

MIN_SECRET = 8
"""Characters of a key from which on it is a secret. Servers of one's own get a word like `EMPTY`,
which a reply may well say."""


class ChatServer(Section):
    """A server of the chat-completions protocol and one model of it."""

    url: str
    """Address in front of `/chat/completions`, such as `http://host:8000/v1`."""
    model: str = Field(min_length=1)
    """Name under which the server has the model."""
    api_key_env: KeyVariable | None = None
    """Name of the environment variable with the key, in capitals; None where none is needed. The
    key itself is written nowhere."""
    max_concurrent: PositiveInt = 32
    """Requests at a time, at most."""
    timeout: float = Field(300.0, gt=0)
    """Seconds that one request may take."""
    max_retries: int = Field(6, ge=0, strict=True)
    """How often a request is sent again after failures that pass."""
    max_outage: float = Field(600.0, ge=0)
    """Seconds that the server may be out of reach, or ask to wait, before the run stops."""
    extra_body: dict[str, pydantic.JsonValue] = Field(default_factory=dict)
    """Further fields of every request, such as `chat_template_kwargs`."""
    image_detail: Literal["auto", "low", "high"] | None = None
    """How closely images are looked at, for servers that ask; None leaves it to them."""
    video_frames: PositiveInt = 8
    """Frames of a video that are sent, evenly over it, as images; of one with fewer, all."""

    @pydantic.field_validator("url")
    @classmethod
    def _check_url(cls, url: str) -> str:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("the address of a server begins with http:// or https://")
        if parts.username is not None or parts.password is not None:
            told = "no key or password stands in the address; name its variable with api_key_env"
            raise PydanticCustomError(SECRET, told)
        if parts.query or parts.fragment:
            raise ValueError("the address ends before ? and #")
        url = url.rstrip("/")
        if url.endswith("/chat/completions"):
            raise ValueError("the address ends before /chat/completions")
        return url

    @pydantic.field_validator("extra_body")
    @classmethod
    def _check_extra_body(cls, extra: dict[str, Any]) -> dict[str, Any]:
        taken = sorted(REQUEST_FIELDS & extra.keys())
        if taken:
            raise ValueError(f"the client sets {', '.join(taken)} itself")
        canonical_json(extra)  # NaN is no JSON
        return extra

    def identity(self) -> dict[str, Any]:
        """What replies depend on, as JSON: not how fast or how patiently the server is asked."""
        chosen = {"url", "model", "extra_body", "image_detail", "video_frames"}
        return self.model_dump(include=chosen, exclude_defaults=True)


def read_key(server: ChatServer) -> str | None:
    """The key from the environment; None where the server needs none.

    Raises:
      MmpoError: the variable is not set, or what is in it can be no key.
    """
    name = server.api_key_env
    if name is None:
        return None
    key = os.environ.get(name, "").strip()
    if not key:
        raise MmpoError(f"{server.url}: the environment variable {name} has no key in it")
    if not re.fullmatch(r"[\x21-\x7e]+", key):
        raise MmpoError(f"{server.url}: what is in {name} is no key: it has blanks or other signs")
    return key


def key_variables(section: Section) -> set[str]:
    """Names of the environment variables that have keys of the servers anywhere in a section."""
    found = set()
    if isinstance(section, ChatServer) and section.api_key_env is not None:
        found.add(section.api_key_env)
    for _, value in section:
        for part in value if isinstance(value, tuple) else (value,):
            if isinstance(part, Section):
                found |= key_variables(part)
    return found


def secret_of(key: str | None) -> str | None:
    """A key that no text may repeat; None where there is none, or it is too short to be secret."""
    return None if key is None or len(key) < MIN_SECRET else key


def hide_key(value: Any, key: str | None) -> Any:
    """A JSON value, or a text, from a server that may have repeated the key in it."""
    key = secret_of(key)
    if key is None:
        return value
    if isinstance(value, str):
        return value.replace(key, HIDDEN)
    if isinstance(value, list):
        return [hide_key(item, key) for item in value]
    if isinstance(value, dict):
        return {hide_key(name, key): hide_key(item, key) for name, item in value.items()}
    return value
