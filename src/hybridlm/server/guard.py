"""What stands before every request: who may come, from where, how often; and what is written down about it.

A page in somebody's browser can send requests to this machine. So requests with an `Origin` must come from the page
that this server serves or from an origin that was allowed, and while the server listens on the loopback interface
only, it must be addressed by a loopback name (a stranger's name that resolves to 127.0.0.1 is DNS rebinding).
"""

from __future__ import annotations

import hmac
import ipaddress
import json
import logging
import secrets
import sys
import time
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders, State
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hybridlm.server.errors import ApiError, error_body, from_exception
from hybridlm.server.metrics import Metrics
from hybridlm.server.settings import Settings
from hybridlm.server.wire import Gone, dump

__all__ = ["Guard", "is_loopback", "set_up_logging"]

log = logging.getLogger("hybridlm.server")
OPEN_PATHS = ("/health", "/ready", "/", "/page/")  # what needs no key: nothing of it tells anything
_TRACKED = 10_000  # callers whose rate is remembered


class Guard:
    """The application's outermost layer. Every error becomes an answer here."""

    def __init__(self, app: ASGIApp, state: State) -> None:
        """`state` has the server's `models`, `settings` and `metrics`; a request finds it as `request.app.state`."""
        self.app, self.state = app, state
        self.settings: Settings = state.settings
        self.metrics: Metrics = state.metrics
        self._tokens: dict[str, tuple[float, float]] = {}  # caller -> (requests left, when counted)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, headers = time.monotonic(), Headers(scope=scope)
        request_id = "req_" + secrets.token_hex(8)
        scope["app"] = self
        scope.setdefault("state", {})["request_id"] = request_id
        status, origin = 0, self._allowed_origin(headers)

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                out = MutableHeaders(scope=message)
                out["x-request-id"] = request_id
                out["x-content-type-options"] = "nosniff"
                if origin:
                    out["access-control-allow-origin"] = origin
                    out["vary"] = "origin"
            await send(message)

        self.metrics.in_flight += 1
        try:
            self._check(scope, headers, origin)
            if scope["method"] == "OPTIONS" and origin:
                await answer({"type": "http.response.start", "status": 204, "headers": [
                    (b"access-control-allow-methods", b"GET, POST"), (b"access-control-max-age", b"600"),
                    (b"access-control-allow-headers", b"authorization, content-type, x-api-key, anthropic-version")]})
                await answer({"type": "http.response.body", "body": b""})
                return
            await self.app(scope, receive, answer)
        except Gone:
            status = status or 499  # nobody is there to read an answer
        except Exception as error:
            told = from_exception(error)
            if told.status == 500:
                log.exception("a bug", extra={"data": {"request": request_id}})
            if status:
                raise
            await _send_error(answer, scope["path"], told, request_id)
        finally:
            self.metrics.in_flight -= 1
            route = scope.get("route")
            self.metrics.responses[getattr(route, "path", "other"), status] += 1
            log.info("request", extra={"data": {
                "request": request_id, "method": scope["method"], "path": scope["path"][:200], "status": status,
                "ms": round(1e3 * (time.monotonic() - began), 1), **_told(scope)}})

    def _check(self, scope: Scope, headers: Headers, origin: str | None) -> None:
        host = urlsplit("//" + headers.get("host", "")).hostname or ""
        if is_loopback(self.settings.host) and not is_loopback(host) and host not in self.settings.hosts:
            raise ApiError(403, "host: this server answers to loopback names only; start it with --allow-host NAME")
        if headers.get("origin") and not origin and headers["origin"] != f"{scope['scheme']}://{headers.get('host')}":
            raise ApiError(403, "origin: pages from elsewhere may not use this server; start it with --cors ORIGIN")
        if scope["method"] == "OPTIONS":
            return
        path, caller = scope["path"], (scope.get("client") or ("", 0))[0]
        if self.settings.api_keys and not (path in OPEN_PATHS or path.startswith("/page/")):
            given = headers.get("x-api-key") or headers.get("authorization", "").partition(" ")[2]
            key = next((k for k in self.settings.api_keys if hmac.compare_digest(k.encode(), given.encode())), None)
            if key is None:
                raise ApiError(401, "api key: missing or unknown; send it as Authorization: Bearer KEY or x-api-key")
            caller = key
        if self.settings.rate and scope["method"] == "POST":
            self._spend(caller)

    def _spend(self, caller: str) -> None:
        """One of a caller's requests, of which it has `rate` that come back evenly over a minute."""
        rate, now = self.settings.rate, time.monotonic()
        if len(self._tokens) > _TRACKED:
            self._tokens = {k: v for k, v in self._tokens.items() if now - v[1] < 60}
        left, counted = self._tokens.get(caller, (float(rate), now))
        left = min(rate, left + (now - counted) * rate / 60)
        if left < 1:
            self._tokens[caller] = (left, now)
            wait = int((1 - left) * 60 / rate) + 1
            raise ApiError(429, f"rate: at most {rate} requests a minute; try again in {wait} s", retry_after=wait)
        self._tokens[caller] = (left - 1, now)

    def _allowed_origin(self, headers: Headers) -> str | None:
        origin = headers.get("origin")
        return origin if origin and (origin in self.settings.cors or "*" in self.settings.cors) else None


async def _send_error(send: Send, path: str, error: ApiError, request_id: str) -> None:
    body = dump(error_body(path, error, request_id))
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if error.retry_after is not None:
        headers.append((b"retry-after", str(error.retry_after).encode()))
    if error.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _told(scope: Scope) -> dict[str, Any]:
    """What the log says about outputs: figures, never content."""
    answers = scope["state"].get("answers")
    if not answers:
        return {}
    usage = [a.usage for a in answers]
    return {"model": answers[0].loaded.name, "prompt_tokens": sum(u.prompt_tokens for u in usage),
            "cached_tokens": sum(u.cached_tokens for u in usage),
            "tokens": sum(u.completion_tokens for u in usage), "finish": answers[0].finish or "incomplete",
            "queue_ms": round(1e3 * usage[0].queue_seconds, 1), "prompt_ms": round(1e3 * usage[0].prompt_seconds, 1)}


def is_loopback(host: str) -> bool:
    if host.lower() == "localhost" or host.lower().endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


class _Lines(logging.Formatter):
    """A line a record, as JSON or for people; `extra={"data": {...}}` gives the fields."""

    def __init__(self, as_json: bool) -> None:
        super().__init__()
        self.as_json = as_json

    def format(self, record: logging.LogRecord) -> str:
        data = getattr(record, "data", {})
        trace = self.formatException(record.exc_info) if record.exc_info else ""
        if self.as_json:
            stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"
            return json.dumps({"time": stamp, "level": record.levelname.lower(), "event": record.getMessage(), **data,
                               **({"trace": trace} if trace else {})}, ensure_ascii=True, default=str)
        fields = " ".join(f"{k}={str(v).replace(chr(10), ' ')}" for k, v in data.items())
        line = f"{time.strftime('%H:%M:%S', time.localtime(record.created))} {record.getMessage()} {fields}".rstrip()
        return line + ("\n" + trace if trace else "")


def set_up_logging(form: str) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Lines(form == "json"))
    log.handlers[:] = [handler]
    log.setLevel(logging.INFO)
    log.propagate = False
