"""The HTTP face of the engine: endpoints of the OpenAI API, tokens, health and metrics, as a Starlette application.

Nothing here waits for the engine's thread: bodies are parsed in other threads, and events come through a queue.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import ipaddress
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

from bitnet_jax.data.conversation import with_begin
from bitnet_jax.data.errors import DataError
from bitnet_jax.optional_packages import missing_package
from bitnet_jax.serving.embeddings import Encoder, embeddings
from bitnet_jax.serving.engine import Engine
from bitnet_jax.serving.fields import ApiError, Fields, parse_body
from bitnet_jax.serving.metrics import Metrics
from bitnet_jax.serving.openapi import document
from bitnet_jax.serving.page import chat_page
from bitnet_jax.serving.requests import Closed, Finished, QueueFull, TooLong
from bitnet_jax.serving.responses import ResponseEnvelope, response
from bitnet_jax.serving.schemas import Asked, Served, chat_completion, completion, token_ids
from bitnet_jax.serving.streams import Completion, EventStream, Reply, Running, cancelled_if_the_client_leaves

try:
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route
except ImportError as error:
    raise DataError(missing_package("starlette")) from error

MAX_BODY = 4 << 20  # bytes
BODY_SECONDS = 30.0  # for a client to send it
RETRY_SECONDS = 2
OPEN = ("/health",)  # without an API key, and from any host
PAGE = "/"  # without an API key: the page asks for it

Endpoint = Callable[[Request], Awaitable[Any]]


class Serving:
    """What the endpoints share: the model once it is loaded, with the engine or encoder that runs it."""

    def __init__(self, api_key: str | None = None, host: str = "127.0.0.1") -> None:
        self.engine: Engine | None = None
        self.encoder: Encoder | None = None
        self.served: Served | None = None
        self.api_key, self.host = api_key, host
        self.metrics = Metrics(lambda: self.engine)
        self.created = int(time.time())

    def loaded(self, model: Engine | Encoder, served: Served) -> None:
        if isinstance(model, Encoder):
            self.encoder = model
        else:
            self.engine = model
        self.served = served  # last: from now on it is ready

    @property
    def generating(self) -> tuple[Engine, Served]:
        """Raises ApiError 503 while the model is loading, 400 for an encoder."""
        served = self.ready
        if self.engine is None:
            raise ApiError(f"{served.name} gives vectors of texts and writes none; use /v1/embeddings")
        return self.engine, served

    @property
    def encoding(self) -> tuple[Encoder, Served]:
        """Raises ApiError 503 while the model is loading, 400 for a model that writes text."""
        served = self.ready
        if self.encoder is None:
            raise ApiError(
                f"{served.name} writes text and gives no vectors; serve a sentence encoder for these"
            )
        return self.encoder, served

    @property
    def ready(self) -> Served:
        """Raises ApiError 503 while the model is loading."""
        if self.served is None:
            raise ApiError(
                "the model is loading; try again later",
                status=503,
                kind="server_error",
                headers={"Retry-After": str(RETRY_SECONDS)},
            )
        return self.served

    def check(self, request: Request) -> None:
        """Raises ApiError: no or a wrong API key, or a page of another site that wants to use the server."""
        if request.url.path in OPEN:
            return
        if self.api_key is not None:
            if request.url.path == PAGE:
                return
            scheme, _, key = request.headers.get("authorization", "").partition(" ")
            # Headers are bytes, which Starlette decodes as Latin-1.
            right = hmac.compare_digest(key.strip().encode("latin-1"), self.api_key.encode())
            if scheme.lower() != "bearer" or not right:
                raise ApiError(
                    "got no or a wrong API key, expected the header Authorization: Bearer KEY",
                    status=401,
                    kind="authentication_error",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
        elif is_loopback(self.host) and not is_loopback(request.url.hostname or ""):
            # A name of another site that was made to resolve to this machine: the browser takes it for that site.
            raise ApiError(f"got the host {request.url.hostname!r}, expected localhost", status=403)
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if request.method == "POST" and kind != "application/json":  # others a page may send without asking
            raise ApiError(f"got the content type {kind!r}, expected application/json", status=415)


def is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def application(serving: Serving) -> Starlette:
    def route(path: str, endpoint: Endpoint, method: str) -> Route:
        async def guarded(request: Request) -> Any:
            serving.check(request)
            return await endpoint(request)

        return Route(path, guarded, methods=[method])

    async def health(request: Request) -> Response:
        if serving.served is None:
            return JSONResponse({"status": "loading"}, 503)
        return JSONResponse({"status": "ok"})

    async def page(request: Request) -> Response:
        content, headers = chat_page()
        return Response(content, headers=headers, media_type="text/html")

    async def metrics(request: Request) -> Response:
        return Response(serving.metrics.text(), media_type=serving.metrics.media_type)

    async def slots(request: Request) -> Response:
        return JSONResponse(serving.generating[0].describe_slots())

    async def described_by_openapi(request: Request) -> Response:
        return JSONResponse(document(serving.ready))

    def described(name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": serving.created, "owned_by": "bitnet-jax"}

    async def models(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [*map(described, serving.ready.names)]})

    async def model(request: Request) -> Response:
        name = request.path_params["name"]
        serving.ready.adapter(Fields({"model": name}))
        return JSONResponse(described(name))

    async def tokenize(request: Request) -> Response:
        served = serving.ready
        fields = parse_body(await read_body(request))
        text, begin = fields.text("content"), fields.boolean("add_special")
        if text is None:
            raise ApiError("content: missing, expected a text", param="content")
        fields.done()
        with refusing():
            ids = await asyncio.to_thread(served.tokenizer.encode, text)
        ids = with_begin(served.conversation.begin, ids) if begin else ids
        return JSONResponse({"tokens": ids.tolist()})

    async def detokenize(request: Request) -> Response:
        served = serving.ready
        fields = parse_body(await read_body(request))
        ids = token_ids(fields, "tokens", fields.take("tokens"), served)
        fields.done()
        return JSONResponse({"content": await asyncio.to_thread(served.tokenizer.decode, ids)})

    async def vectors(request: Request) -> Response:
        encoder, served = serving.encoding
        body = await read_body(request)
        with refusing():
            asked = await asyncio.to_thread(lambda: embeddings(parse_body(body), served, encoder))
            work = asyncio.create_task(encoder.vectors(asked.ids))
            async with cancelled_if_the_client_leaves(work, request.receive):
                await asyncio.wait([work])
            if work.cancelled():
                raise ClientDisconnect
            return JSONResponse(await asyncio.to_thread(asked.answer, work.result(), served))

    def answered(
        parse: Callable[[Fields, Served, str], Asked], reply_of: Callable[[Asked, Served], Reply] = Completion
    ) -> Endpoint:
        async def endpoint(request: Request) -> Any:
            engine, served = serving.generating
            body = await read_body(request)
            client = request.client.host if request.client else ""

            def finished(event: Finished) -> None:
                serving.metrics.observe(event)
                request.scope.get("answers", []).append(event)  # of the log, see request_log.py

            # Tokenizing a long prompt takes time, and a chat template runs in a separate process.
            with refusing():
                asked = await asyncio.to_thread(lambda: parse(parse_body(body), served, client))
                running = Running(engine, asked, served, finished)
            reply = reply_of(asked, served)
            if asked.stream:
                return EventStream(running, reply)  # Starlette calls it next, and it cancels
            async with cancelled_if_the_client_leaves(running, request.receive):
                async for _ in running.chunks():
                    pass
            return JSONResponse(reply.whole(running.choices))

        return endpoint

    routes = [
        route(PAGE, page, "GET"),
        route("/health", health, "GET"),
        route("/metrics", metrics, "GET"),
        route("/slots", slots, "GET"),
        route("/openapi.json", described_by_openapi, "GET"),
        route("/v1/models", models, "GET"),
        route("/v1/models/{name:path}", model, "GET"),
        route("/v1/chat/completions", answered(chat_completion), "POST"),
        route("/v1/completions", answered(completion), "POST"),
        route("/v1/responses", answered(response, ResponseEnvelope), "POST"),
        route("/v1/embeddings", vectors, "POST"),
        route("/tokenize", tokenize, "POST"),
        route("/detokenize", detokenize, "POST"),
    ]
    errors = (ApiError, QueueFull, Closed, HTTPException, ClientDisconnect, Exception)
    return Starlette(routes=routes, exception_handlers=dict.fromkeys(errors, _error))


@contextlib.contextmanager
def refusing() -> Iterator[None]:
    """What the tokenizer, the chat template or the engine says of the input, as ApiError."""
    try:
        yield
    except RecursionError as error:
        raise ApiError("the body is nested too deeply") from error
    except TooLong as error:
        raise ApiError(str(error), code="context_length_exceeded") from error
    except ValueError as error:
        raise ApiError(str(error)) from error


async def read_body(request: Request) -> bytes:
    """Raises ApiError: longer than MAX_BODY, or slower than BODY_SECONDS."""
    too_long = ApiError(f"the body is too long, expected at most {MAX_BODY} bytes", status=413)
    length = request.headers.get("content-length", "0")
    if length.isdigit() and int(length) > MAX_BODY:
        raise too_long
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                body += part
                if len(body) > MAX_BODY:
                    raise too_long
    except TimeoutError as error:
        raise ApiError(f"the body did not arrive within {BODY_SECONDS:g} s", status=408) from error
    return bytes(body)


async def _error(request: Request, error: Exception) -> Response:
    if isinstance(error, QueueFull):
        again = {"Retry-After": str(RETRY_SECONDS)}
        error = ApiError(str(error), status=429, kind="rate_limit_error", code="queue_full", headers=again)
    elif isinstance(error, Closed):
        error = ApiError(str(error), status=503, kind="server_error", code="shutting_down")
    elif isinstance(error, HTTPException):
        got = f"{request.method} {request.url.path[:60]}"
        message = {
            404: f"got {got}, which this server does not have",
            405: f"got {got}, expected another method",
        }
        error = ApiError(message.get(error.status_code, error.detail), status=error.status_code)
    elif not isinstance(error, ApiError):
        failed = "the server failed; its log says why"
        error = ApiError(failed, status=500, kind="server_error", code="server_error")
    return JSONResponse(error.body, error.status, error.headers)
