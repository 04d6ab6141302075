"""The paths of the server."""

from __future__ import annotations

from importlib import resources
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

from eellm import __version__
from eellm.serving.access_log import AccessLog, Entry
from eellm.serving.answers import Form
from eellm.serving.engine import Engine
from eellm.serving.errors import ERRORS, ApiError, wrong
from eellm.serving.gate import Gate
from eellm.serving.generating import ClientLeft, Exchange, Mailbox
from eellm.serving.offer import Offer
from eellm.serving.schema import ChatRequest, CompletionRequest, path_of

_PAGE_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:"

_OR_STREAMED: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}


def build_app(engine: Engine, offer: Offer, log: AccessLog, api_key: str | None) -> Gate:
    """The ASGI application."""
    app = FastAPI(title="eellm", version=__version__, docs_url=None, redoc_url=None, responses=ERRORS)
    page = (resources.files("eellm.serving") / "page.html").read_text(encoding="utf-8")

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def show_page() -> HTMLResponse:
        return HTMLResponse(page, headers={"content-security-policy": _PAGE_POLICY, "x-content-type-options": "nosniff"})

    @app.get("/health")
    async def health() -> Response:
        status = "stopping" if engine.stopping else "ok"
        content = {"status": status, "queued": engine.queued, "running": engine.running}
        return JSONResponse(content, 503 if engine.stopping else 200)

    @app.get("/metrics", include_in_schema=False)
    async def metrics() -> Response:
        return Response(engine.statistics.text(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [offer.model_card()]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        if name != offer.name:
            raise ApiError(404, f"There is no model {name[:100]!r}, only {offer.name!r}.", "model", "model_not_found")
        return offer.model_card()

    @app.post("/v1/completions", responses=_OR_STREAMED)
    async def completions(asked: CompletionRequest, http: Request) -> Response:
        return await _answer(engine, offer, asked, http)

    @app.post("/v1/chat/completions", responses=_OR_STREAMED)
    async def chat_completions(asked: ChatRequest, http: Request) -> Response:
        return await _answer(engine, offer, asked, http)

    _handle_errors(app)
    limits = offer.limits
    return Gate(app, log, engine.statistics, limits.max_body_bytes, api_key)


async def _answer(engine: Engine, offer: Offer, asked: CompletionRequest | ChatRequest, http: Request) -> Response:
    entry: Entry = http.scope["entry"]
    if isinstance(asked, ChatRequest) and asked.top_logprobs and not asked.logprobs:
        raise wrong("top_logprobs", "needs logprobs=true.")
    if asked.stream_options is not None and not asked.stream:
        raise wrong("stream_options", "needs stream=true.")
    if offer.limits.log_prompts:
        entry.fields["request"] = asked.model_dump(exclude_unset=True, mode="json")
    mailbox = Mailbox()
    jobs = offer.jobs(asked, entry.fields["client"], mailbox.listener)
    entry.jobs = jobs
    form = Form(offer.name, offer.tokenizer, isinstance(asked, ChatRequest), asked.wants_logprobs)
    entry.fields["id"] = form.id
    engine.submit(jobs)
    exchange = Exchange(engine, entry, form, mailbox, jobs)
    if not asked.stream:
        return await exchange.whole(http)
    with_usage = asked.stream_options is not None and bool(asked.stream_options.include_usage)
    return exchange.stream(with_usage, offer.limits.request_timeout)


def _handle_errors(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def told(http: Request, error: ApiError) -> Response:
        http.scope["entry"].fields |= {"outcome": error.outcome, "param": error.param, "code": error.code}
        return JSONResponse(error.body, error.status, error.headers)

    @app.exception_handler(RequestValidationError)
    async def malformed(http: Request, error: RequestValidationError) -> Response:
        found = error.errors()[0]
        kind, location = found["type"], tuple(found["loc"][1:])
        place = path_of(location, unknown=kind == "extra_forbidden") if kind != "json_invalid" else ""
        message = found["msg"].removeprefix("Value error, ")
        return await told(
            http, wrong(place, message) if place else ApiError(400, f"The body is not what it should be: {message}.")
        )

    @app.exception_handler(HTTPException)
    async def refused(http: Request, error: HTTPException) -> Response:
        return await told(http, ApiError(error.status_code, str(error.detail)))

    @app.exception_handler(ClientLeft)
    async def left(http: Request, error: ClientLeft) -> Response:
        http.scope["entry"].fields["outcome"] = "client left"
        return Response(status_code=499)

    @app.exception_handler(Exception)
    async def failed(http: Request, error: Exception) -> Response:
        return await told(http, ApiError(500, "The server met an error of its own.", code="internal_error"))
