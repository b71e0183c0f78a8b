"""The URLs of the server. Knows nothing about signals, sockets or how a model is opened."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from llama.common.printable import printable_line
from llama.engine.sampling import Sampling
from llama.generation import Llama
from llama.server.answering import (
    Prepared,
    as_api_error,
    respond,
    send_json,
    watched,
)
from llama.server.chat_body import parse_chat
from llama.server.completion_body import parse_completion
from llama.server.constraints import constraint
from llama.server.errors import ApiError, error_body
from llama.server.fields import read_json
from llama.server.guard import MAX_BODY, Guard, Receive, Scope, Send, read_body, send_bytes
from llama.server.metrics import Metrics
from llama.server.models import check_model, describe_model, served_names
from llama.server.openapi import openapi
from llama.server.replies import ChatReply, CompletionReply
from llama.server.requests import chat_prompt, chat_requests, completion_requests
from llama.server.settings import ServerSettings
from llama.server.static import page_routes
from llama.server.threads import Threads
from llama.server.token_bodies import detokenize, parse_detokenize, parse_tokenize, tokenize
from llama.server.worker import UnavailableError, Worker

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

log = logging.getLogger("llama")
QUICK = 16_384  # bytes of a body that is read at once, without a thread
SLOW = (b"response_format", b"tool_choice", b"\\u")  # what may ask for a grammar (or spell it)
PREPARED_WITHIN = 20  # seconds
Result = TypeVar("Result")
Handler = Callable[["Service", Scope, Receive, Send], Awaitable[None]]


@dataclass(frozen=True)
class Service:
    """What the handlers of all URLs share.

    Attributes:
        defaults: sampling where a request sets none.
        model: the name of the base in requests; adapters have their own.
    """

    worker: Worker
    settings: ServerSettings
    defaults: Sampling
    model: str
    metrics: Metrics
    threads: Threads
    started: int


def make_app(
    worker: Worker,
    settings: ServerSettings,
    defaults: Sampling | None = None,
    model: str = "llama3",
) -> Starlette:
    """The ASGI application; see `Service` for the arguments."""
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.middleware import Middleware
    from starlette.routing import Route

    metrics = Metrics(worker)
    service = Service(
        worker=worker,
        settings=settings,
        defaults=defaults or Sampling(),
        model=model,
        metrics=metrics,
        threads=Threads(),
        started=int(time.time()),
    )
    handlers: list[tuple[str, str, Handler]] = [
        ("GET", "/health", health),
        ("GET", "/metrics", show_metrics),
        ("GET", "/v1/models", list_models),
        ("GET", "/v1/models/{name:path}", show_model),
        ("POST", "/v1/chat/completions", partial(generate, prepare=prepare_chat)),
        ("POST", "/v1/completions", partial(generate, prepare=prepare_completion)),
        ("POST", "/tokenize", partial(convert, parse=parse_tokenize, reply=tokenize)),
        ("POST", "/detokenize", partial(convert, parse=parse_detokenize, reply=detokenize)),
        ("GET", "/openapi.json", show_openapi),
    ]
    routes = [
        Route(path, Endpoint(handler, service), methods=[method])
        for method, path, handler in handlers
    ]
    paths = {path for _, path, _ in handlers}
    guard = Middleware(Guard, settings=settings, count=metrics.counter_of(paths))
    app = Starlette(
        routes=routes + page_routes(),
        middleware=[guard],
        exception_handlers={HTTPException: no_such_path},
    )
    app.router.redirect_slashes = False  # behind a proxy with TLS it would name an http:// URL
    return app


def no_such_path(request: Request, error: Exception) -> Response:
    """The answer of Starlette's router to an unknown path or method."""
    from starlette.responses import Response

    status, headers = getattr(error, "status_code", 404), getattr(error, "headers", None)
    allowed = (headers or {}).get("Allow")
    message = {
        404: "there is nothing at this path; GET /openapi.json lists those that there are",
        405: f"this path does not take {request.method}; use {allowed}",
    }.get(status, "this request cannot be answered")
    body = error_body(ApiError(status, message))
    return Response(body, status, headers, "application/json")


class Endpoint:
    """A handler as an ASGI application."""

    def __init__(self, handler: Handler, service: Service):
        self.handler, self.service = handler, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self.handler(self.service, scope, receive, send)
        except UnavailableError as e:
            raise as_api_error(e) from None


async def health(service: Service, scope: Scope, receive: Receive, send: Send) -> None:
    """200 if requests are taken."""
    worker = service.worker
    if worker.state == "ready":
        await send_json({"status": "ok"}, send)
        return
    error = {"message": worker.reason, "type": "unavailable_error", "param": None, "code": 503}
    await send_json({"status": worker.state, "error": error}, send, 503)


async def show_metrics(service: Service, scope: Scope, receive: Receive, send: Send) -> None:
    """Figures in the text format of Prometheus."""
    kind = b"text/plain; version=0.0.4; charset=utf-8"
    await send_bytes(service.metrics.text(), send, kind=kind)


async def list_models(service: Service, scope: Scope, receive: Receive, send: Send) -> None:
    names = served_names(service.worker.llama, service.model)
    await send_json({"object": "list", "data": [describe(service, name) for name in names]}, send)


async def show_model(service: Service, scope: Scope, receive: Receive, send: Send) -> None:
    name = check_model(scope["path_params"]["name"], service.worker.llama, service.model)
    await send_json(describe(service, name), send)


def describe(service: Service, name: str) -> dict[str, Any]:
    """The entry of a model in /v1/models."""
    return describe_model(
        service.worker.llama,
        name,
        service.model,
        started=service.started,
        defaults=service.defaults,
    )


async def generate(
    service: Service,
    scope: Scope,
    receive: Receive,
    send: Send,
    *,
    prepare: Callable[[Service, Llama, Any], Prepared],
) -> None:
    """Answer a chat or a text completion."""
    data = await read_body(scope, receive, MAX_BODY)
    llama = service.worker.llama
    if service.settings.log_prompts:
        log_body(data)

    def read() -> Prepared:
        return prepare(service, llama, read_json(data))

    async with watched(receive) as check_client:
        prepared = await run(service, read, data)
        check_client()
        await respond(
            prepared,
            service.worker,
            service.threads,
            send,
            time_limit=service.settings.request_timeout,
        )


async def run(service: Service, function: Callable[[], Result], body: bytes) -> Result:
    """The result of a function that reads a body, in a thread where it may take long.

    Raises:
        ApiError: it takes too long, or that of the function.
    """
    if len(body) <= QUICK and not any(word in body for word in SLOW):
        return function()
    try:
        return await service.threads.run(function, PREPARED_WITHIN)
    except asyncio.TimeoutError:
        raise ApiError(
            400,
            f"the request was not read within {PREPARED_WITHIN} seconds; make its texts shorter, "
            "its schema simpler, or try again when the server has less to do",
            code="too_complex",
        ) from None


def prepare_chat(service: Service, llama: Llama, data: Any) -> Prepared:
    """A chat request, ready to be queued. May take long."""
    body = parse_chat(data)
    model = check_model(body.model, llama, service.model)
    prompt = chat_prompt(llama, body)
    grammar = constraint(llama, body)
    groups = chat_requests(llama, body, prompt, grammar, service.defaults)
    return Prepared(body, groups, ChatReply(llama.tokenizer, body, groups, model))


def prepare_completion(service: Service, llama: Llama, data: Any) -> Prepared:
    """A completion request, ready to be queued. May take long."""
    body = parse_completion(data)
    model = check_model(body.model, llama, service.model)
    groups = completion_requests(llama, body, service.defaults)
    return Prepared(body, groups, CompletionReply(llama.tokenizer, body, groups, model))


def log_body(data: bytes) -> None:
    """Write a request's body to the log."""
    log.info("%s", printable_line(data.decode("utf-8", "replace")))


async def convert(
    service: Service,
    scope: Scope,
    receive: Receive,
    send: Send,
    *,
    parse: Callable[[object], Any],
    reply: Callable[[Llama, Any], Any],
) -> None:
    """Text to ids, or ids to text, which all models of a server share."""
    data, llama = await read_body(scope, receive, MAX_BODY), service.worker.llama

    def read() -> Any:
        body = parse(read_json(data))
        check_model(body.model, llama, service.model)
        return reply(llama, body)

    await send_json(await run(service, read, data), send)


async def show_openapi(service: Service, scope: Scope, receive: Receive, send: Send) -> None:
    await send_json(openapi(), send)
