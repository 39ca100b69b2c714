"""Servers of tiny models in threads, and plain HTTP requests to them."""

from __future__ import annotations

import http.client
import json
import threading
import time
from typing import Any

from bitnet_jax.data.conversation import Conversation
from bitnet_jax.serving.engine import Engine
from bitnet_jax.serving.schemas import Served
from bitnet_jax.serving.server import Load, Server
from tests.bitnet_jax.serving.tiny_models import TOKENIZER, engine

TEMPLATE = """\
{% for m in messages %}<{{ m.role }}>{{ m.content }}
{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"""
CONVERSATION = Conversation(end=(0,), template=TEMPLATE)


def tiny() -> tuple[Engine, Served]:
    serving = engine()
    return serving, Served("tiny", TOKENIZER, CONVERSATION, serving.context)


def started(model: Load = tiny, *, loading: threading.Event | None = None, **options: Any) -> Server:
    """A server on a free port, ready unless `loading` is to be set first."""

    def load() -> tuple[Engine, Served]:
        if loading is not None:
            loading.wait()
        return model()

    ready = threading.Event()
    server = Server(load, port=0, on_ready=lambda _: ready.set(), **options)
    threading.Thread(target=server.run, daemon=True).start()
    if loading is None:
        ready.wait()
    return server


def connection(server: Server) -> http.client.HTTPConnection:
    host, port = server.address.removeprefix("http://").split(":")
    return http.client.HTTPConnection(host, int(port), timeout=60)


def ask(server: Server, path: str, body: Any = None, **headers: str) -> tuple[int, Any, dict[str, str]]:
    """(status, JSON or text of the answer, headers); a body that is not bytes is sent as JSON."""
    link = connection(server)
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    sent = {"Content-Type": "application/json"} | headers if body is not None else headers
    link.request("GET" if body is None else "POST", path, data, sent)
    answer = link.getresponse()
    content = answer.read().decode()
    link.close()
    kind = answer.headers.get("content-type", "")
    return answer.status, json.loads(content) if "json" in kind else content, dict(answer.headers)


def until(condition: Any, seconds: float = 20) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()
