"""The log: a line of JSON for each request, without what was said unless asked for, and never the key."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

pytest.importorskip("starlette", reason="package starlette is not installed; pip install starlette")
pytest.importorskip("uvicorn", reason="package uvicorn is not installed; pip install uvicorn")
pytest.importorskip("prometheus_client", reason="package prometheus-client is not installed")
pytest.importorskip("jinja2", reason="package jinja2 is not installed; pip install jinja2")

from tests.bitnet_jax.serving.tiny_servers import ask, connection, started, until

KEY = "a secret key"
BODY = {"model": "tiny", "prompt": "a private prompt", "max_tokens": 5, "temperature": 0}


@pytest.mark.parametrize("prompts", [False, True])
def test_what_is_logged(monkeypatch: pytest.MonkeyPatch, prompts: bool) -> None:
    lines: list[str] = []
    server = started(api_key=KEY, log=lines.append, log_prompts=prompts)
    try:
        right = {"Authorization": f"Bearer {KEY}"}
        status, answer, _ = ask(server, "/v1/completions", BODY, **right)
        assert (status, ask(server, "/v1/completions", BODY)[0]) == (200, 401)
        assert ask(server, "/v1/completions", BODY | {"stream": True, "n": 2}, **right)[0] == 200
        assert ask(server, "/health")[0] == 200
        assert until(lambda: len(lines) == 3)
        first, refused, stream = map(json.loads, lines)
        (counted,) = first["answers"]
        assert counted.items() >= {"reason": "length", "prompt_tokens": 16, "completion_tokens": 5}.items()
        assert 0 < counted["first_seconds"] <= counted["seconds"] <= first["seconds"]
        assert (first["client"], first["method"], first["path"]) == ("127.0.0.1", "POST", "/v1/completions")
        assert (refused["status"], refused["answers"], len(stream["answers"])) == (401, [], 2)
        assert json.loads(first["body"]) == BODY if prompts else "body" not in first

        engine = server.serving.engine
        assert engine is not None
        (pool,) = engine._pools
        decode = pool.decode
        monkeypatch.setattr(pool, "decode", lambda *arguments: (time.sleep(0.02), decode(*arguments))[1])
        link = connection(server)  # it leaves, and what it asked for is cancelled
        body = json.dumps(BODY | {"max_tokens": 140})
        link.request("POST", "/v1/completions", body, right | {"Content-Type": "application/json"})
        assert until(lambda: engine.running == 1)
        link.close()
        assert until(lambda: len(lines) == 4)
        left: Any = json.loads(lines[3])
        assert left["status"] is None
        assert [counted["reason"] for counted in left["answers"]] == ["cancelled"]
        text = "".join(lines)
        assert ("private" in text) == prompts
        assert KEY not in text
        assert answer["choices"][0]["text"] not in text
    finally:
        server.stop()
