"""HTTP in a thread of its own: the main thread decodes, where signals arrive and CUDA devices are chosen."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from eellm.errors import UserError
from eellm.serving.gate import App

HEAD_SECONDS = 20.0
"""In which the head of a request must have come."""
_UNREAD_SECONDS = 30
"""After which the system drops a connection whose other end takes nothing."""
_LAST_WORDS_SECONDS = 5
"""In which answers that are complete still reach their clients when the server ends."""


class Protocol(H11Protocol):
    """Hangs up on who connects and does not come to the end of a request's head, and on clients with too many connections.

    `open_by` counts the connections of each client address.
    """

    def __init__(self, max_connections: int, open_by: Counter[str], **_uvicorns: Any):
        super().__init__(**_uvicorns)
        self._max_connections, self._open_by = max_connections, open_by
        self._address = ""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._address = self.client[0] if self.client else "unknown"
        self._open_by[self._address] += 1
        if self._open_by[self._address] > self._max_connections:
            transport.abort()
        self._expect_request()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._open_by[self._address] -= 1
        if not self._open_by[self._address]:
            del self._open_by[self._address]

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._expect_request()

    def _expect_request(self) -> None:
        answered = self.cycle

        def look() -> None:
            if self.cycle is answered and (answered is None or answered.response_complete):
                self.transport.abort()

        self.loop.call_later(HEAD_SECONDS, look)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises UserError where the address cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _UNREAD_SECONDS * 1000)
    try:
        listener.bind((host, port))
        listener.listen(1024)
    except OSError as error:
        listener.close()
        raise UserError(f"serve.host={host} serve.port={port}: cannot listen there ({error.strerror or error}).") from error
    return listener


def address_of(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


@contextmanager
def answering(app: App, listener: socket.socket, max_connections: int) -> Iterator[None]:
    """Answer requests inside; afterwards let those that are complete reach their clients."""
    protocol: Any = partial(Protocol, max_connections, Counter())
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        lifespan="off",
        http=protocol,
        ws="none",
        server_header=False,
        timeout_graceful_shutdown=_LAST_WORDS_SECONDS,
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True, name="http")
    thread.start()
    try:
        yield
    finally:
        server.should_exit = True
        thread.join(_LAST_WORDS_SECONDS + 5)
