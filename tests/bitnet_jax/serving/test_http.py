"""The server over HTTP: the answers of the engine, errors in the shape of OpenAI's, and clients that leave."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.bitnet_jax.serving.tiny_models import answers, engine, request, text

pytest.importorskip("starlette", reason="package starlette is not installed; pip install starlette")
pytest.importorskip("uvicorn", reason="package uvicorn is not installed; pip install uvicorn")
pytest.importorskip("prometheus_client", reason="package prometheus-client is not installed")
pytest.importorskip("jinja2", reason="package jinja2 is not installed; pip install jinja2")

from bitnet_jax.serving.server import Server
from tests.bitnet_jax.serving.tiny_servers import ask, connection, started, until

KEY = "a secret"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    running = started()
    yield running
    running.stop()


def complete(server: Server, **fields: Any) -> Any:
    status, answer, _ = ask(server, "/v1/completions", {"model": "tiny", "temperature": 0, **fields})
    assert status == 200, answer
    return answer


def test_what_runs_together_is_what_each_gets_alone(server: Server) -> None:
    """Sixteen clients at once, greedy and seeded: no answer holds a byte of another."""
    bodies = [
        {
            "prompt": f"client {i} says " + "ab " * (i % 5),
            "max_tokens": 8,
            "seed": i,
            "temperature": i % 2,
            "logprobs": 1,
        }
        for i in range(16)
    ]
    with ThreadPoolExecutor(16) as clients:
        together = list(clients.map(lambda body: complete(server, **body)["choices"], bodies))
    assert together == [complete(server, **body)["choices"] for body in bodies]
    (events,) = answers(engine(), request(bodies[2]["prompt"].encode(), 8))
    assert together[2][0]["text"] == text(events)


def test_a_text_that_exceeds_the_context_has_the_code_that_clients_look_for(server: Server) -> None:
    _, answer, _ = ask(server, "/v1/completions", {"model": "tiny", "prompt": "x" * 200})
    assert answer["error"]["code"] == "context_length_exceeded"


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "temperature": 0, **fields}


def test_a_stream_is_the_answer_in_pieces(server: Server) -> None:
    body = chat(max_tokens=9, logprobs=True, top_logprobs=2, n=2, seed=1, temperature=1)
    _, whole, _ = ask(server, "/v1/chat/completions", body)
    stream = {"stream": True, "stream_options": {"include_usage": True}}
    status, events, headers = ask(server, "/v1/chat/completions", body | stream)
    assert (status, headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
    lines = [line.removeprefix("data: ") for line in events.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    *chunks, last = map(json.loads, lines[:-1])
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]
    assert {chunk["usage"] for chunk in chunks} == {None}
    for choice in whole["choices"]:
        own = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == choice["index"]]
        assert own[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(part["delta"].get("content", "") for part in own) == choice["message"]["content"]
        scores = [entry for part in own if part["logprobs"] for entry in part["logprobs"]["content"]]
        assert scores == choice["logprobs"]["content"]
        assert (
            b"".join(bytes(entry["bytes"]) for entry in scores).decode(errors="replace")
            == choice["message"]["content"]
        )
        assert {len(entry["top_logprobs"]) for entry in scores} == {2}
        assert [part["finish_reason"] for part in own if part["finish_reason"]] == [choice["finish_reason"]]
    assert whole["choices"][0]["message"]["content"] != whole["choices"][1]["message"]["content"]


def test_echo_with_log_probabilities_scores_the_prompt(server: Server) -> None:
    """As lm-evaluation-harness asks: the legacy shape, over the prompt and one generated token."""
    prompt = "scored é"
    fields = {"prompt": prompt, "max_tokens": 1, "echo": True, "logprobs": 1}
    choice = complete(server, **fields)["choices"][0]
    scored, size = choice["logprobs"], len(prompt.encode())
    assert choice["text"].startswith(prompt)
    assert {len(values) for values in scored.values()} == {size + 1}
    assert scored["tokens"][:8] + scored["tokens"][8:9] == [*"scored ", "bytes:\\xc3", "bytes:\\xa9"]
    assert scored["text_offset"][:9] == [0, 1, 2, 3, 4, 5, 6, 7, 7]
    assert scored["token_logprobs"][0] is scored["top_logprobs"][0] is None
    for token, ln, likely in list(
        zip(scored["tokens"], scored["token_logprobs"], scored["top_logprobs"], strict=True)
    )[1:]:
        assert likely[token] == ln <= max(likely.values()) <= 0
    by_ids = complete(server, **fields | {"prompt": list(prompt.encode())})["choices"][0]
    assert by_ids == choice
    both = complete(server, **fields | {"prompt": [prompt, "another"], "max_tokens": 0})["choices"]
    assert [part["index"] for part in both] == [0, 1]
    assert both[0]["logprobs"]["token_logprobs"] == scored["token_logprobs"][:-1]
    assert both[1]["text"] == "another"
    plain = complete(server, prompt=prompt, max_tokens=1, echo=True)["choices"][0]
    assert (plain["text"], plain["logprobs"]) == (choice["text"], None)


def test_a_second_turn_reads_only_what_is_new(server: Server) -> None:
    messages = [{"role": "system", "content": "You answer in one word, and only one."}]
    used = []
    for turn in ("Why?", "And then?"):
        messages.append({"role": "user", "content": turn})
        _, answer, _ = ask(server, "/v1/chat/completions", chat(messages=messages, max_tokens=4))
        messages.append({"role": "assistant", "content": answer["choices"][0]["message"]["content"]})
        used.append(answer["usage"])
    assert used[1]["prompt_tokens_details"]["cached_tokens"] > used[0]["prompt_tokens"] - 5


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("chat/completions", chat(tools=[{"type": "function"}]), 400, "tools[0].function: got None"),
        ("chat/completions", chat(response_format={"type": "xml"}), 400, "response_format.type: got 'xml'"),
        ("chat/completions", chat(functions=[]), 400, "functions: unknown or unsupported field"),
        ("chat/completions", chat(messages=[{"role": "tool", "content": ""}]), 400, "tool_call_id: got '', expected"),
        ("chat/completions", chat(messages=[{"role": "user", "content": [{"type": "image_url"}]}]), 400, "type: got"),
        ("chat/completions", chat(messages=[{"role": "user", "content": "x", "name": "y"}]), 400, "name: unknown"),
        ("chat/completions", chat(max_tokens=500), 400, "500 new ones need 512 positions, expected at most 160"),
        ("chat/completions", chat(max_tokens=0), 400, "max_tokens: got 0, expected an integer from 1"),
        ("chat/completions", chat(temperature=-1), 400, "temperature: got -1"),
        ("chat/completions", chat(top_logprobs=3), 400, "top_logprobs: not supported"),
        ("chat/completions", chat(stop=["a"] * 17), 400, "stop: got"),
        ("chat/completions", chat(stop=[""]), 400, "stop: got"),
        ("chat/completions", chat(logit_bias={"256": 1}), 400, "bias: got the token 256"),
        ("chat/completions", chat(logit_bias={"٣": 1}), 400, "logit_bias: got"),
        ("chat/completions", chat(n=129), 400, "n: got 129"),
        ("chat/completions", chat(seed="1"), 400, "seed: got '1'"),
        ("chat/completions", chat(stream=True, stream_options={"x": 1}), 400, "stream_options.x: unknown"),
        ("chat/completions", {"model": "other"}, 404, "model: got 'other', expected 'tiny'"),
        ("chat/completions", {"messages": []}, 400, "model: missing"),
        ("completions", {"model": "tiny", "prompt": ""}, 400, "the prompt has no tokens"),
        ("completions", {"model": "tiny", "prompt": [1, 256]}, 400, "prompt: got"),
        ("completions", {"model": "tiny", "prompt": "x", "best_of": 3}, 400, "best_of: not supported"),
        ("completions", {"model": "tiny", "prompt": ["x"] * 129}, 400, "prompt: got 129, expected at most 128"),
        ("completions", b"[1]", 400, "expected a JSON object"),
        ("completions", b'{"a": NaN}', 400, "not valid JSON in UTF-8"),
        ("completions", b'{"a": "\xff"}', 400, "not valid JSON in UTF-8"),
        ("completions", b"[" * 100_000, 400, "nested too deeply"),
        ("completions", b'{"seed": ' + b"9" * 5000 + b"}", 400, "not valid JSON in UTF-8"),
        ("completions", b" " * (5 << 20), 413, "the body is too long"),
        ("moderations", {"model": "tiny", "input": "x"}, 404, "got POST /v1/moderations, which this server does not"),
    ],
)  # fmt: skip
def test_bad_input_has_an_answer_in_the_shape_of_openai(
    server: Server, path: str, body: Any, status: int, message: str
) -> None:
    got, answer, _ = ask(server, f"/v1/{path}", body)
    assert got == status
    assert message in answer["error"]["message"]
    assert set(answer["error"]) == {"message", "type", "param", "code"}


def test_tokens_models_and_metrics(server: Server) -> None:
    assert ask(server, "/tokenize", {"content": "aé"})[1] == {"tokens": [97, 195, 169]}
    assert ask(server, "/detokenize", {"tokens": [97, 195, 169]})[1] == {"content": "aé"}
    assert ask(server, "/detokenize", {"tokens": [-1]})[0] == 400
    assert [model["id"] for model in ask(server, "/v1/models")[1]["data"]] == ["tiny"]
    assert ask(server, "/v1/models/tiny")[1]["owned_by"] == "bitnet-jax"
    assert ask(server, "/v1/models/other")[0] == 404
    status, metrics, _ = ask(server, "/metrics")
    assert status == 200
    assert "bitnet_jax_slots 3.0" in metrics
    assert "bitnet_jax_generated_tokens_total" in metrics


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_cancels_its_answer_even_before_the_first_token(
    server: Server, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    serving = server.serving.engine
    assert serving is not None
    (pool,) = serving._pools
    read, held, reading = pool.read_tokens, threading.Event(), threading.Event()

    def slow(*arguments: Any) -> Any:
        reading.set()
        held.wait()
        return read(*arguments)

    monkeypatch.setattr(pool, "read_tokens", slow)
    before = serving.counters.cancelled, serving.counters.passes
    link = connection(server)
    body = {"model": "tiny", "prompt": "long " * 25, "max_tokens": 20, "stream": stream}
    link.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    assert reading.wait(20)
    # Health does not wait for the engine.
    began = time.monotonic()
    assert ask(server, "/health")[0] == 200
    assert time.monotonic() - began < 5
    answer = next(slot.answer for slot in serving._slots if slot.answer is not None)
    link.close()
    assert until(lambda: answer.cancelled)
    held.set()
    assert until(lambda: serving.counters.cancelled == before[0] + 1)
    assert serving.counters.passes <= before[1] + 1  # the chunk it was in
    assert serving.running == 0


def test_a_full_queue_says_when_to_come_again(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.serving.engine, "_queue_limit", 0)
    status, answer, headers = ask(server, "/v1/completions", {"model": "tiny", "prompt": "x"})
    assert (status, answer["error"]["code"], headers["retry-after"]) == (429, "queue_full", "2")


def test_while_the_model_loads_and_with_a_key() -> None:
    loading = threading.Event()
    server = started(loading=loading, api_key=KEY)
    try:
        assert until(lambda: ask(server, "/health")[0] == 503)
        right = {"Authorization": f"Bearer {KEY}"}
        status, answer, headers = ask(server, "/v1/models", **right)
        assert (status, headers["retry-after"]) == (503, "2")
        assert "loading" in answer["error"]["message"]
        loading.set()
        assert until(lambda: ask(server, "/health")[0] == 200)  # without a key
        assert ask(server, "/v1/models", **right)[0] == 200
        for wrong in (
            {},
            {"Authorization": "Bearer"},
            {"Authorization": f"Bearer {KEY}x"},
            {"Authorization": KEY},
        ):
            status, answer, _ = ask(server, "/v1/models", **wrong)
            assert (status, answer["error"]["code"]) == (401, "invalid_api_key")
            assert ask(server, "/metrics", **wrong)[0] == 401
    finally:
        loading.set()
        server.stop()


def test_pages_of_other_sites_cannot_use_the_server(server: Server) -> None:
    status, answer, headers = ask(server, "/v1/models", Host="evil.example:80", Origin="http://evil.example")
    assert (status, answer["error"]["message"]) == (403, "got the host 'evil.example', expected localhost")
    assert not [name for name in headers if name.lower().startswith("access-control")]
    assert ask(server, "/v1/models", Host="localhost:8080")[0] == 200
    form = {"Content-Type": "text/plain"}
    assert ask(server, "/v1/completions", {"model": "tiny", "prompt": "x"}, **form)[0] == 415


def test_a_model_that_cannot_be_loaded_ends_the_server() -> None:
    def load() -> Any:
        raise ValueError("damaged")

    with pytest.raises(ValueError, match="damaged"):
        Server(load, port=0).run()


def test_the_openai_client(server: Server) -> None:
    openai = pytest.importorskip("openai", reason="package openai is not installed; pip install openai")
    with openai.OpenAI(base_url=f"{server.address}/v1", api_key="unused", max_retries=0) as client:
        assert [model.id for model in client.models.list()] == ["tiny"]
        fields = chat(max_tokens=9, seed=3, logprobs=True, top_logprobs=1)
        answer = client.chat.completions.create(**fields)
        with client.chat.completions.create(**fields, stream=True) as stream:
            pieces = [chunk.choices[0].delta.content or "" for chunk in stream]
        assert "".join(pieces) == answer.choices[0].message.content
        assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
        scored = client.completions.create(model="tiny", prompt="x", max_tokens=1, echo=True, logprobs=1)
        assert scored.choices[0].logprobs.token_logprobs[0] is None
        with pytest.raises(openai.BadRequestError, match="verbosity: unknown or unsupported"):
            client.chat.completions.create(**fields, verbosity="low")
        with pytest.raises(openai.NotFoundError, match="model: got 'other'"):
            client.completions.create(model="other", prompt="x")
