"""What clients are told of requests that get no answer, as OpenAI's protocol says it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pydantic

KINDS = {
    401: "authentication_error",
    404: "not_found_error",
    429: "rate_limit_error",
}
"""Status -> what an error is called; others are `invalid_request_error`, or the server's."""


class Refusal(Exception):
    """A request that is not answered, and why."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after: int | None = None,
    ):
        """
        Args:
          status: of HTTP.
          message: for whoever wrote the request.
          code: a word for programs.
          param: field of the body that is at fault.
          retry_after: seconds after which it may be tried again.
        """
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.retry_after = retry_after

    @property
    def body(self) -> dict[str, Any]:
        """The body of the reply."""
        kind = KINDS.get(self.status, "invalid_request_error" if self.status < 500 else "")
        told = {"message": self.message, "type": kind or "server_error"}
        return {"error": {**told, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> Mapping[str, str]:
        """The headers of the reply."""
        return {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}


def bad_request(message: str, param: str | None = None, code: str | None = None) -> Refusal:
    """400: the request itself is at fault."""
    return Refusal(400, message, param=param, code=code)


def of_validation(error: pydantic.ValidationError) -> Refusal:
    """400, with all that is wrong with a body."""
    told, first = [], None
    for problem in error.errors(include_url=False, include_input=False):
        place = ""
        for key in problem["loc"]:
            if isinstance(key, int):
                place += f"[{key}]"
            elif key.isidentifier() and key not in ("str", "list", "text", "image_url"):
                place += f".{key}" if place else key
        first = first or place or None
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            message = "this server knows no such field"
        told.append(f"{place}: {message}" if place else message)
    return bad_request("; ".join(dict.fromkeys(told)), param=first)
