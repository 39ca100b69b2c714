"""Hostile and unlucky clients: whatever they send or leave open, others get their answers, with the same bytes."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import pytest

pytest.importorskip("starlette", reason="package starlette is not installed; pip install starlette")
pytest.importorskip("uvicorn", reason="package uvicorn is not installed; pip install uvicorn")
pytest.importorskip("prometheus_client", reason="package prometheus-client is not installed")
pytest.importorskip("jinja2", reason="package jinja2 is not installed; pip install jinja2")

from bitnet_jax.serving import http as http_face
from bitnet_jax.serving import streams
from bitnet_jax.serving.fields import Fields
from bitnet_jax.serving.server import Server
from tests.bitnet_jax.chat_folders import write_folder
from tests.bitnet_jax.serving.tiny_servers import ask, connection, started, tiny, until

JSON = {"Content-Type": "application/json"}
BODY = {"model": "tiny", "prompt": "the same", "max_tokens": 8, "temperature": 0}
HUGE = (2**31, -(2**31), 10**40, -1.5, 1e308, 2**63, True, "1", [], {}, float("1e400"))


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    running = started()
    yield running
    running.stop()


def answer(server: Server) -> str:
    status, got, _ = ask(server, "/v1/completions", BODY)
    assert status == 200, got
    return got["choices"][0]["text"]


def test_no_value_of_any_field_is_a_failure_of_the_server(server: Server) -> None:
    """Refused with 400 and an error of OpenAI's shape, or answered; never 500, never a hang."""
    expected = answer(server)
    fields = [
        "max_tokens", "temperature", "top_p", "n", "seed", "logprobs", "echo", "stream", "stop", "logit_bias",
        "presence_penalty", "frequency_penalty", "user", "prompt", "stream_options", "model", "never_heard_of",
    ]  # fmt: skip
    for name in fields:
        for value in HUGE:
            status, got, _ = ask(server, "/v1/completions", json.dumps(BODY | {name: value}).encode())
            assert status in (200, 400, 404), (name, value, got)
            assert status == 200 or set(got["error"]) == {"message", "type", "param", "code"}
    assert answer(server) == expected


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (BODY | {"stop": [str(i) for i in range(5000)]}, 400),
        (BODY | {"stop": "x" * 100_000}, 400),
        (BODY | {"logit_bias": {str(i): 1 for i in range(5000)}}, 400),
        (BODY | {"prompt": "lone surrogate \ud800"}, 400),
        (b'{"model": "tiny", "prompt": "x", "temperature": 1e400}', 400),
        (b'{"model": "tiny", "prompt": "x", "logit_bias": {"1": -1e400}}', 400),
        (BODY | {"model": "x" * 100_000}, 404),
        (BODY | {"prompt": [[[1]]]}, 400),
        (b'{"model": "tiny", "prompt": "' + b"x" * (10 << 20) + b'"}', 413),
        (b'{"a":' * 50_000 + b"1" + b"}" * 50_000, 400),
        (b"", 400),
        (b"\x00\xff\xfe", 400),
        (b'{"model": "tiny", "prompt": "cut', 400),
        (b"null", 400),
    ],
)  # fmt: skip
def test_bodies_that_no_client_should_send(server: Server, body: Any, status: int) -> None:
    got, said, _ = ask(server, "/v1/completions", body)
    assert got == status, said
    assert len(said["error"]["message"]) < 400  # it does not send back what it got


def test_a_body_without_a_length_is_limited_too(server: Server) -> None:
    link = connection(server)
    link.putrequest("POST", "/v1/completions")
    link.putheader("Content-Type", "application/json")
    link.putheader("Transfer-Encoding", "chunked")
    link.endheaders()
    piece = b"%x\r\n%s\r\n" % (1 << 20, b" " * (1 << 20))
    with contextlib.suppress(OSError):  # it may answer and close before all is sent
        for _ in range(10):
            link.send(piece)
    assert link.getresponse().status == 413
    link.close()


def test_half_open_connections_keep_nobody_waiting(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two hundred that stop in the middle of a header or a body; bodies are given up after a while."""
    expected = answer(server)
    monkeypatch.setattr(http_face, "BODY_SECONDS", 0.5)
    host, port = server.address.removeprefix("http://").split(":")
    header = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
    body = header + b"Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
    with contextlib.ExitStack() as links:
        opened = [links.enter_context(socket.create_connection((host, int(port)), 20)) for _ in range(200)]
        for i, link in enumerate(opened):
            link.sendall(header if i % 2 else body)
        assert answer(server) == expected
        assert opened[0].recv(64).startswith(b"HTTP/1.1 408")


def test_a_stream_says_something_while_a_long_prompt_is_read(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert server.serving.engine is not None
    (pool,) = server.serving.engine._pools
    read, held = pool.read_tokens, threading.Event()
    monkeypatch.setattr(streams, "PING_SECONDS", 0.05)
    monkeypatch.setattr(pool, "read_tokens", lambda *arguments: (held.wait(), read(*arguments))[1])
    link = connection(server)
    link.request("POST", "/v1/completions", json.dumps(BODY | {"stream": True}), JSON)
    stream = link.getresponse()
    assert [stream.readline(), stream.readline()] * 2 == [b": ping\n", b"\n"] * 2
    held.set()
    assert stream.read().endswith(b"data: [DONE]\n\n")
    link.close()


@pytest.mark.parametrize("begun", [False, True])
def test_an_answer_whose_task_is_cancelled_ends(begun: bool) -> None:
    """As at a shutdown: after the request is accepted, before anything is sent or in the middle."""
    serving, served = tiny()

    async def scenario() -> None:
        asked = http_face.completion(Fields(BODY | {"stream": True, "max_tokens": 60}), served, "")
        running = streams.Running(serving, asked, served, lambda _: None)
        sent: list[Any] = []

        async def receive() -> Any:
            await asyncio.Event().wait()

        async def send(message: Any) -> None:
            sent.append(message)

        stream = streams.EventStream(running, streams.Completion(asked, served))
        task = asyncio.create_task(stream({}, receive, send))
        for _ in range(50):
            await asyncio.sleep(0)
            if begun and len(sent) < 2:  # the start, and a first piece of text
                serving.step()
        assert (len(sent) > 1) == begun
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(scenario())
    while serving.step():
        pass
    assert (serving.counters.cancelled, serving.running, serving.waiting) == (1, 0, 0)


@pytest.mark.parametrize("seconds", [3, pytest.param(120, marks=pytest.mark.slow)])
def test_overload(server: Server, monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Ten times as many clients as slots, which retry at once, leave early, and ask whether the server is well.

    Every answer has its bytes or is a 429 that says when to come again; health is answered all the time; afterwards
    nothing is left, in slots, queue or memory.
    """
    engine = server.serving.engine
    assert engine is not None
    monkeypatch.setattr(engine, "_queue_limit", 8)
    prompts = [f"prompt {i} " * (1 + i % 3) for i in range(10)]
    bodies = [BODY | {"prompt": prompt, "seed": i, "temperature": i % 2} for i, prompt in enumerate(prompts)]
    alone = [ask(server, "/v1/completions", body)[1]["choices"] for body in bodies]
    held = sum(array.nbytes for array in jax.live_arrays())
    end, statuses, slowest = time.monotonic() + seconds, Counter[int](), 0.0
    wrong: list[Any] = []

    def client(number: int) -> None:
        source = random.Random(number)
        while time.monotonic() < end:
            i = source.randrange(len(bodies))
            if source.random() < 0.1:  # it leaves without an answer
                link = connection(server)
                link.request("POST", "/v1/completions", json.dumps(bodies[i] | {"stream": True}), JSON)
                link.close()
                continue
            status, got, headers = ask(server, "/v1/completions", bodies[i])
            statuses[status] += 1
            if status == 200 and got["choices"] != alone[i]:
                wrong.append((got["choices"], alone[i]))
            if status == 429 and "retry-after" not in headers:
                wrong.append(headers)

    def heartbeat() -> None:
        nonlocal slowest
        while time.monotonic() < end:
            began = time.monotonic()
            assert ask(server, "/health")[0] == 200
            slowest = max(slowest, time.monotonic() - began)

    with ThreadPoolExecutor(10 * engine.slots + 1) as pool:
        for done in [pool.submit(heartbeat), *(pool.submit(client, i) for i in range(10 * engine.slots))]:
            done.result()
    assert not wrong
    assert set(statuses) <= {200, 429}
    assert statuses[200] > 10
    assert slowest < 10
    assert until(lambda: engine.running == engine.waiting == 0)
    assert [ask(server, "/v1/completions", body)[1]["choices"] for body in bodies] == alone
    assert engine.counters.failed == 0
    assert sum(array.nbytes for array in jax.live_arrays()) <= held + (
        1 << 20
    )  # the prefix cache does not grow


@pytest.mark.extended
def test_a_server_that_is_killed_in_a_stream_starts_again_at_its_port(tmp_path: Path) -> None:
    """kill -9: the client sees that the answer is incomplete, and the next server answers it."""
    folder = write_folder(tmp_path / "model")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}

    def serve(port: str) -> tuple[subprocess.Popen[str], http.client.HTTPConnection]:
        command = [sys.executable, "-m", "bitnet_jax.cli", "serve", str(folder), "--port", port]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
        )
        assert process.stdout is not None
        line = process.stdout.readline()
        process.stdout.close()
        assert line.startswith("serving ")
        return process, http.client.HTTPConnection(line.split()[3].removeprefix("http://"), timeout=60)

    # The model repeats a letter for ever; the second stream is cut.
    body = json.dumps(BODY | {"model": "model", "prompt": "a", "max_tokens": 200, "stream": True})
    process, link = serve("0")
    try:
        link.request("POST", "/v1/completions", body, JSON)
        whole = link.getresponse().read()
        link.request("POST", "/v1/completions", body, JSON)
        stream = link.getresponse()
        assert stream.readline().startswith(b"data: ")
        process.kill()
        process.wait()
        with pytest.raises((http.client.IncompleteRead, ConnectionError)):
            stream.read()
        link.close()
        process, link = serve(str(link.port))
        link.request("POST", "/v1/completions", body, JSON)
        texts = [
            "".join(
                json.loads(line[6:])["choices"][0]["text"] for line in data.splitlines() if line[6:7] == b"{"
            )
            for data in (whole, link.getresponse().read())
        ]
        assert texts == ["a" * 200] * 2
    finally:
        link.close()
        process.kill()
        process.wait()
