"""A line of JSON for each request: when, from whom, how it ended, how many tokens; what it says only if asked for."""

from __future__ import annotations

import datetime
import json
import time
from collections.abc import Awaitable, Callable
from typing import Any

from bitnet_jax.serving.requests import Finished

POLLED = ("/health", "/metrics")  # by machines, every few seconds: not logged
SHOWN = 200  # characters of a path


class RequestLog:
    """ASGI middleware.

    Args:
      write: takes a line, without its end.
      prompts: the bodies of requests are written too. Headers, which may hold a key, and answers never are.
    """

    def __init__(self, app: Any, write: Callable[[str], None], *, prompts: bool = False) -> None:
        self._app, self._write, self._prompts = app, write, prompts

    async def __call__(
        self, scope: Any, receive: Callable[[], Awaitable[Any]], send: Callable[[Any], Awaitable[None]]
    ) -> None:
        if scope["type"] != "http" or scope["path"] in POLLED:
            await self._app(scope, receive, send)
            return
        began, now = time.perf_counter(), datetime.datetime.now(datetime.UTC)
        answers: list[Finished] = []
        status, left, body = None, False, bytearray()

        async def received() -> Any:
            nonlocal left
            message = await receive()
            left = left or message["type"] == "http.disconnect"
            if self._prompts:
                body.extend(message.get("body", b""))
            return message

        async def sent(message: Any) -> None:
            nonlocal status
            status = status if left else message.get("status", status)
            await send(message)

        try:
            await self._app({**scope, "answers": answers}, received, sent)
        finally:
            entry = {
                "time": now.isoformat(timespec="milliseconds"),
                "client": scope["client"][0] if scope["client"] else None,
                "method": scope["method"],
                "path": scope["path"][:SHOWN],
                "status": status,  # null: the client left before there was one
                "seconds": round(time.perf_counter() - began, 6),
                "answers": [_counted(answer) for answer in answers],
            }
            if self._prompts:
                entry["body"] = body.decode("utf-8", errors="replace")
            self._write(json.dumps(entry))


def _counted(answer: Finished) -> dict[str, Any]:
    """What is known of an answer but its text."""
    fields = answer._asdict()
    return {name: round(value, 6) if isinstance(value, float) else value for name, value in fields.items()}
