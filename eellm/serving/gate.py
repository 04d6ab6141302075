"""What every request passes before a handler sees it: the API key, the limits on its body, the access log."""

from __future__ import annotations

import asyncio
import hmac
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from eellm.serving.access_log import AccessLog, Entry
from eellm.serving.errors import ApiError
from eellm.serving.statistics import Statistics

Scope = MutableMapping[str, Any]
Event = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Event]]
Send = Callable[[Event], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

BODY_SECONDS = 30.0
"""In which a request's body must have come."""
KNOWN = ("/", "/health", "/metrics", "/v1/models", "/v1/completions", "/v1/chat/completions")


class Gate:
    """ASGI middleware. `api_key` None: nobody is asked for one; the page, /health and /metrics never ask."""

    def __init__(self, app: App, log: AccessLog, statistics: Statistics, max_body: int, api_key: str | None):
        self.app, self.log, self.statistics, self.max_body = app, log, statistics, max_body
        self._key = None if api_key is None else api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        entry = Entry((scope.get("client") or ("unknown",))[0], scope["method"], scope["path"])
        scope["entry"] = entry

        async def noting(event: Event) -> None:
            if event["type"] == "http.response.start":
                entry.fields["status"] = event["status"]
            await send(event)

        try:
            self._check_key(scope)
            await self.app(scope, await self._with_body(scope, receive), noting)
        except ApiError as error:
            await refuse(error, entry, noting)
        finally:
            path = scope["path"] if scope["path"] in KNOWN else "other"
            self.statistics.requests.labels(path, str(entry.fields.get("status", 499))).inc()
            row = entry.row()
            self.statistics.seconds.labels(path).observe(row["seconds"])
            if path not in ("/health", "/metrics"):  # which are asked every few seconds
                self.log.write(entry)

    def _check_key(self, scope: Scope) -> None:
        if self._key is None or not scope["path"].startswith("/v1/"):
            return
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        scheme, _, key = given.partition(b" ")
        if scheme.lower() != b"bearer" or not hmac.compare_digest(key.strip(), self._key):
            raise ApiError(401, "A valid API key is needed: Authorization: Bearer <key>.", code="invalid_api_key")

    async def _with_body(self, scope: Scope, receive: Receive) -> Receive:
        """Read the body, which must be small and come in time; returns what hands it on."""
        length = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        if length.isdigit() and int(length) > self.max_body:
            raise self._too_large()
        try:
            async with asyncio.timeout(BODY_SECONDS):
                first = await self._read(receive)
        except TimeoutError:
            raise ApiError(408, f"The body did not come within {BODY_SECONDS:g} seconds.", code="timeout") from None
        waiting = [first]

        async def handed_on() -> Event:
            return waiting.pop() if waiting else await receive()

        return handed_on

    async def _read(self, receive: Receive) -> Event:
        parts, size, more = [], 0, True
        while more:
            event = await receive()
            if event["type"] != "http.request":
                return event
            parts.append(event.get("body", b""))
            size, more = size + len(parts[-1]), event.get("more_body", False)
            if size > self.max_body:
                raise self._too_large()
        return {"type": "http.request", "body": b"".join(parts), "more_body": False}

    def _too_large(self) -> ApiError:
        return ApiError(413, f"The body is larger than {self.max_body} bytes.", code="body_too_large")


async def refuse(error: ApiError, entry: Entry, send: Send) -> None:
    entry.fields |= {"outcome": error.outcome, "param": error.param, "code": error.code}
    body = json.dumps(error.body).encode()
    # hang up: the rest of a body that nobody reads would keep the connection busy
    headers = {"content-type": "application/json", "content-length": str(len(body)), "connection": "close", **error.headers}
    coded = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": coded})
    await send({"type": "http.response.body", "body": body})
