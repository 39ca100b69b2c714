"""Between the thread of the engine and the event loop: events of an answer, its stream, and clients that leave."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from typing import Any, Protocol

from bitnet_jax.serving.answer import Answer
from bitnet_jax.serving.engine import Engine
from bitnet_jax.serving.fields import ApiError
from bitnet_jax.serving.objects import Choice, Envelope
from bitnet_jax.serving.requests import Event, Finished
from bitnet_jax.serving.schemas import Asked, Served

PING_SECONDS = (
    15.0  # between comments in a stream that has nothing to say, so that nothing on the way closes it
)
PING = ": ping"
Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]


class Cancellable(Protocol):
    """Answers that run, or a task."""

    def cancel(self) -> Any: ...


class Running:
    """The choices of a body at work. `cancel` must be called in the end, whatever happens.

    Raises (when made): what `Engine.submit` raises; then none of the choices runs.
    """

    def __init__(
        self, engine: Engine, asked: Asked, served: Served, finished: Callable[[Finished], None]
    ) -> None:
        self._finished = finished
        self.choices = [Choice(asked, served, i) for i in range(len(asked.requests))]
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._answers: list[Answer] = []
        loop = asyncio.get_running_loop()

        def sink(index: int, event: Event) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens
                loop.call_soon_threadsafe(self._events.put_nowait, (index, event))

        try:
            for i, request in enumerate(asked.requests):
                self._answers.append(engine.submit(request, partial(sink, i)))
        except BaseException:
            self.cancel()
            raise

    def cancel(self) -> None:
        for answer in self._answers:
            answer.cancel()

    async def chunks(self) -> AsyncIterator[dict[str, Any] | None]:
        """Choices of chunks, until all are finished; None where PING_SECONDS pass without one.

        Raises ApiError: the engine failed, the grammar of an answer did, or the engine ended an answer after its time
        or because the server shuts down.
        """
        for choice in self.choices:
            if (first := choice.begin()) is not None:
                yield first
        left = len(self.choices)
        while left:
            try:
                index, event = await asyncio.wait_for(self._events.get(), PING_SECONDS)
            except TimeoutError:
                yield None
                continue
            if isinstance(event, Finished):
                left -= 1
                self._finished(event)
                if (failure := _failure(event)) is not None:
                    raise failure
            if (chunk := self.choices[index].take(event)) is not None:
                yield chunk


def _failure(event: Finished) -> ApiError | None:
    """What the end of an answer is to the client, if not all of it came."""
    match event.reason:
        case "error":
            message = f"the engine failed: {event.message}"
            return ApiError(message, status=500, kind="server_error", code="server_error")
        case "grammar":
            message = f"the answer cannot go on within its schema: {event.message}; simplify the schema"
            return ApiError(message, code="invalid_json_schema")
        case "timeout":
            message = f"{event.message}; request fewer tokens"
            return ApiError(message, status=504, kind="server_error", code="timeout")
        case "cancelled":
            message = "the server is shutting down"
            return ApiError(message, status=503, kind="server_error", code="shutting_down")
    return None


@contextlib.asynccontextmanager
async def cancelled_if_the_client_leaves(work: Cancellable, receive: Receive) -> AsyncIterator[None]:
    """Cancels the work when the client disconnects, also where nothing is sent yet, and in the end."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        work.cancel()

    watcher = asyncio.create_task(watch())
    try:
        yield
    finally:
        work.cancel()
        watcher.cancel()


class Reply(Protocol):
    """What running choices are to the client: one object, or the lines of a stream."""

    def whole(self, choices: list[Choice]) -> dict[str, Any]: ...

    def events(self, running: Running) -> AsyncIterator[str]: ...


class Completion(Envelope):
    """The reply of both kinds of completion."""

    async def events(self, running: Running) -> AsyncIterator[str]:
        try:
            async for choice in running.chunks():
                yield PING if choice is None else data(self.chunk([choice]))
            if (usage := self.last(running.choices)) is not None:
                yield data(usage)
            yield "data: [DONE]"
        except ApiError as error:  # the status has been sent
            yield data(error.body)


class EventStream:
    """Server-sent events of an answer, as an ASGI response."""

    def __init__(self, running: Running, reply: Reply) -> None:
        self._running, self._reply = running, reply

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        async with cancelled_if_the_client_leaves(self._running, receive):
            headers = [
                (b"content-type", b"text/event-stream; charset=utf-8"),
                (b"cache-control", b"no-cache"),
            ]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            async for line in self._reply.events(self._running):
                await send({"type": "http.response.body", "body": f"{line}\n\n".encode(), "more_body": True})
            await send({"type": "http.response.body", "body": b""})


def data(value: dict[str, Any]) -> str:
    return "data: " + json.dumps(value, allow_nan=False)
