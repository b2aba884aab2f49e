"""Errors on the wire: one kind inside, the shape of the API that was called outside, and always somebody's fault: the
client's (4xx), the load's (429, 503), or a bug's (500, which tells nothing but a number to look for in the log)."""

from __future__ import annotations

from typing import Any

from starlette.exceptions import HTTPException

from hybridlm.engine.scheduler import Closed, QueueFull, TimedOut
from hybridlm.errors import HybridLMError, ModelNotFoundError

__all__ = ["ApiError", "error_body", "from_exception"]

_ANTHROPIC_TYPES = {400: "invalid_request_error", 401: "authentication_error", 403: "permission_error",
                    404: "not_found_error", 413: "request_too_large", 429: "rate_limit_error", 500: "api_error",
                    503: "overloaded_error"}
_OPENAI_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error",
                 429: "rate_limit_error", 500: "server_error", 503: "server_error"}


class ApiError(HybridLMError):
    """An answer that is an error."""

    def __init__(self, status: int, message: str, *, param: str | None = None, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.retry_after = status, message, param, retry_after


def from_exception(error: BaseException) -> ApiError:
    """What an exception means to a client; a bug is 500."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, HTTPException):  # the router's
        told = {404: "nothing is served at this path; GET /openapi.json lists what is",
                405: "method: not for this path; GET /openapi.json lists what is"}
        return ApiError(error.status_code, told.get(error.status_code, error.detail))
    if isinstance(error, QueueFull):
        return ApiError(429, str(error), retry_after=error.retry_after)
    if isinstance(error, TimedOut | Closed):
        return ApiError(503, str(error), retry_after=5)
    if isinstance(error, ModelNotFoundError):
        return ApiError(404, str(error))
    if isinstance(error, HybridLMError):
        message = str(error)
        name = message.partition(":")[0]
        return ApiError(400, message, param=name if name.isidentifier() else None)
    return ApiError(500, "internal error; the server's log tells more")


def error_body(path: str, error: ApiError, request_id: str = "") -> dict[str, Any]:
    """The error as the API at `path` writes it."""
    if path.startswith("/v1/messages"):
        kind = _ANTHROPIC_TYPES.get(error.status, "invalid_request_error")
        return {"type": "error", "error": {"type": kind, "message": error.message}, "request_id": request_id}
    if path.startswith("/api/"):
        return {"error": error.message}
    kind = _OPENAI_TYPES.get(error.status, "invalid_request_error")
    return {"error": {"message": error.message, "type": kind, "param": error.param, "code": None}}
