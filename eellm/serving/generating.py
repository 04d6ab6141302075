"""Between the engine's thread and an answer: whole or as server-sent events, for a client that may go away or read slowly."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from eellm.serving.access_log import Entry
from eellm.serving.answers import Form
from eellm.serving.engine import Engine
from eellm.serving.errors import ApiError
from eellm.serving.job import Event, Finish, Job, Piece

READING_SECONDS = 15.0
"""That a client may take to read the rest of its answer when the time for the request is over."""


class ClientLeft(Exception):
    """Nobody waits for the answer any more."""


class Mailbox:
    """Events of a request's jobs, in order, in the server's event loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()

    def listener(self, index: int) -> Callable[[Event], None]:
        def deliver(event: Event) -> None:
            with suppress(RuntimeError):  # the loop is closed: the server has ended
                self._loop.call_soon_threadsafe(self._events.put_nowait, (index, event))

        return deliver

    async def events(self, count: int) -> AsyncIterator[tuple[int, Piece | Finish]]:
        """Everything of `count` jobs until all have finished. Raises the ApiError of the first that fails."""
        while count:
            index, event = await self._events.get()
            if isinstance(event, ApiError):
                raise event
            count -= isinstance(event, Finish)
            yield index, event


class EventStream(StreamingResponse):
    """Chunks as they come. Whatever ends it, its jobs leave the engine; a client that does not read ends it in the end."""

    def __init__(self, engine: Engine, entry: Entry, jobs: Sequence[Job], chunks: AsyncIterator[str], seconds: float):
        super().__init__(chunks, media_type="text/event-stream", headers={"cache-control": "no-store", "x-accel-buffering": "no"})
        self._engine, self._entry, self._jobs, self._seconds = engine, entry, jobs, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._entry.fields["outcome"] = "client left"  # unless it hears the end
        try:
            async with asyncio.timeout(self._seconds):
                await super().__call__(scope, receive, send)
        except TimeoutError:
            self._entry.fields["outcome"] = "client reads too slowly"
        finally:
            self._engine.cancel(self._jobs)


@dataclass(frozen=True)
class Exchange:
    """A request that the engine works on, and how it is answered."""

    engine: Engine
    entry: Entry
    form: Form
    mailbox: Mailbox
    jobs: Sequence[Job]

    async def whole(self, http: HttpRequest) -> Response:
        """The answer when all is there. Raises ClientLeft where nobody waits for it."""
        heard: list[list[Piece]] = [[] for _ in self.jobs]

        async def collect() -> None:
            async for index, event in self.mailbox.events(len(self.jobs)):
                if isinstance(event, Finish):
                    self.entry.ends[index] = event
                else:
                    heard[index].append(event)

        collecting, leaving = asyncio.create_task(collect()), asyncio.create_task(_leaves(http))
        try:
            await asyncio.wait((collecting, leaving), return_when=asyncio.FIRST_COMPLETED)
            if not collecting.done():
                raise ClientLeft
            await collecting
        finally:
            collecting.cancel()
            leaving.cancel()
            self.engine.cancel(self.jobs)
        self.entry.fields["outcome"] = "done"
        return JSONResponse(self.form.answer(self.jobs, heard, self._ends))

    def stream(self, with_usage: bool, seconds: float) -> EventStream:
        """Server-sent events for so long at most, as a client may read slowly."""
        return EventStream(self.engine, self.entry, self.jobs, self._chunks(with_usage), seconds + READING_SECONDS)

    async def _chunks(self, with_usage: bool) -> AsyncIterator[str]:
        """The last one is `[DONE]`; an error on the way is an event too, for the status has been sent."""
        form, entry = self.form, self.entry
        try:
            for index in range(len(self.jobs) if form.chat else 0):
                yield _sent(form.first_chunk(index))
            async for index, event in self.mailbox.events(len(self.jobs)):
                if isinstance(event, Finish):
                    entry.ends[index] = event
                    yield _sent(form.last_chunk(index, event))
                else:
                    yield _sent(form.chunk(index, event))
        except ApiError as error:
            entry.fields["code"] = error.code
            yield _sent(error.body)
            entry.fields["outcome"] = error.outcome
            return
        if with_usage:
            yield _sent(form.usage_chunk(self.jobs, self._ends))
        yield "data: [DONE]\n\n"
        entry.fields["outcome"] = "done"

    @property
    def _ends(self) -> list[Finish]:
        return [self.entry.ends[index] for index in range(len(self.jobs))]


async def _leaves(http: HttpRequest) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


def _sent(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"
