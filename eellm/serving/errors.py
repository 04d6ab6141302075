"""Errors as OpenAI's clients expect them."""

from __future__ import annotations

import math
from typing import Any

from pydantic import BaseModel


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """What every answer that is an error says."""

    error: ErrorDetail


ERRORS: dict[int | str, dict[str, Any]] = {"4XX": {"model": ErrorBody}, "5XX": {"model": ErrorBody}}
"""For the OpenAPI document."""

_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """What a client is told. `param` names the field that is wrong; `code` is for programs."""

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None, retry_after: float | None = None
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.retry_after = status, message, param, code, retry_after

    @property
    def headers(self) -> dict[str, str]:
        """The official client tries again by itself after 429 and 5xx; a request that took too long would only do so again."""
        headers = {"x-should-retry": "false"} if self.code == "timeout" else {}
        if self.retry_after is not None:
            headers["retry-after"] = str(max(1, math.ceil(self.retry_after)))
        return headers

    @property
    def outcome(self) -> str:
        """For the access log."""
        return "refused" if self.status < 500 or self.status == 503 else "failed"

    @property
    def body(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def wrong(param: str, message: str) -> ApiError:
    """A field of the request that cannot be."""
    return ApiError(400, f"{param}: {message}", param, "invalid_value")


def stopping() -> ApiError:
    return ApiError(503, "The server is shutting down.", code="shutting_down", retry_after=5)


def too_slow(seconds: float) -> ApiError:
    return ApiError(504, f"The request took longer than {seconds:g} seconds.", code="timeout")
