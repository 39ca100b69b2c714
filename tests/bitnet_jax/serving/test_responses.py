"""The Responses API: the answers of chat in its objects, the order of its events, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("starlette", reason="package starlette is not installed; pip install starlette")
pytest.importorskip("uvicorn", reason="package uvicorn is not installed; pip install uvicorn")
pytest.importorskip("prometheus_client", reason="package prometheus-client is not installed")
pytest.importorskip("jinja2", reason="package jinja2 is not installed; pip install jinja2")

from bitnet_jax.serving.answer import Answer
from bitnet_jax.serving.requests import Finished
from bitnet_jax.serving.server import Server
from tests.bitnet_jax.serving.tiny_servers import ask, started

PATH = "/v1/responses"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    running = started()
    yield running
    running.stop()


def body(**fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "input": "Hi", "temperature": 0, "max_output_tokens": 8, **fields}


def events(content: str) -> list[dict[str, Any]]:
    """The data of a stream, whose `event:` lines must name its types."""
    found = []
    for event in content.removesuffix("\n\n").split("\n\n"):
        name, value = event.split("\n")
        found.append(json.loads(value.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    return found


def unnamed(value: Any) -> Any:
    """Without ids and times."""
    if isinstance(value, dict):
        return {key: unnamed(one) for key, one in value.items() if key not in ("id", "created_at", "usage")}
    return [unnamed(one) for one in value] if isinstance(value, list) else value


def test_a_response_is_the_answer_of_chat(server: Server) -> None:
    parts = [{"type": "input_text", "text": "H"}, {"type": "input_text", "text": "i"}]
    earlier = {"id": "msg_1", "type": "message", "status": "completed", "role": "assistant",
               "content": [{"type": "output_text", "text": "Yes?", "annotations": [], "logprobs": []}]}  # fmt: skip
    items = [{"role": "user", "content": parts}, earlier, {"role": "user", "content": "So"}]
    said = (("system", "Be."), ("user", "Hi"), ("assistant", "Yes?"), ("user", "So"))
    messages = [{"role": role, "content": text} for role, text in said]
    asked = {"model": "tiny", "messages": messages, "temperature": 0, "max_tokens": 8}
    _, chat, _ = ask(server, "/v1/chat/completions", asked)
    status, answer, _ = ask(server, PATH, body(input=items, instructions="Be."))
    assert (status, answer["status"]) == (200, "incomplete"), answer
    assert answer["incomplete_details"] == {"reason": "max_output_tokens"}
    assert answer["output"][0]["content"][0]["text"] == chat["choices"][0]["message"]["content"]
    for ours, theirs in (("input", "prompt"), ("output", "completion"), ("total", "total")):
        assert answer["usage"][f"{ours}_tokens"] == chat["usage"][f"{theirs}_tokens"]


def test_a_stream_has_typed_events_and_ends_once(server: Server) -> None:
    _, whole, _ = ask(server, PATH, body())
    _, content, headers = ask(server, PATH, body(stream=True))
    assert headers["content-type"] == "text/event-stream; charset=utf-8"
    found = events(content)
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    kinds = [event["type"].removeprefix("response.") for event in found]
    assert kinds[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert kinds[-4:] == ["output_text.done", "content_part.done", "output_item.done", "incomplete"]
    assert set(kinds[4:-4]) == {"output_text.delta"}
    text = "".join(event["delta"] for event in found[4:-4])
    assert text == found[-4]["text"] == whole["output"][0]["content"][0]["text"]
    assert unnamed(found[-1]["response"]) == unnamed(whole)


FAILURES = [
    ("timeout", (504, "server_error", "timeout", "slow; request fewer tokens")),
    ("error", (500, "server_error", "server_error", "the engine failed: slow")),
    ("cancelled", (503, "server_error", "shutting_down", "the server is shutting down")),
    (
        "grammar",
        (400, "invalid_request_error", "invalid_json_schema", "cannot go on within its schema: slow;"),
    ),
]


@pytest.mark.parametrize(("reason", "expected"), FAILURES, ids=str)
def test_an_answer_that_fails_says_why_once(
    server: Server, monkeypatch: pytest.MonkeyPatch, reason: str, expected: tuple[int, str, str, str]
) -> None:
    """In the status or the last event, with one code in all endpoints."""
    push = Answer.push

    def failing(self: Answer, token: int, score: Any) -> str | None:
        push(self, token, score)
        self.send(Finished(reason, 1, 1, 0, 0.0, 0.0, "slow"))
        self.cancel()
        return None

    monkeypatch.setattr(Answer, "push", failing)
    chat = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]}
    status, kind, code, message = expected
    for path, asked in (
        (PATH, body()),
        ("/v1/chat/completions", chat),
        ("/v1/completions", {"model": "tiny", "prompt": "x"}),
    ):
        got, answer, _ = ask(server, path, asked)
        error = answer["error"]
        assert (got, error["type"], error["code"], message in error["message"]) == (
            status,
            kind,
            code,
            True,
        ), path
        stream = ask(server, path, asked | {"stream": True})[1]
        if path == PATH:
            found = events(stream)
            ends = [e for e in found if e["type"].split(".")[1] in ("completed", "incomplete", "failed")]
            assert ends == found[-1:]
            assert ends[0]["response"]["status"] == "failed"
            assert ends[0]["response"]["error"] == {"code": code, "message": error["message"]}
        else:
            last = stream.removesuffix("\n\n").split("\n\n")[-1]
            assert json.loads(last.removeprefix("data: ")) == answer


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"input": None}, "input: got None, expected a text or a list of messages"),
        ({"input": []}, "input: got [], expected"),
        ({"input": [{"type": "reasoning"}]}, "input[0].type: got 'reasoning', expected one of message, function_call"),
        ({"input": [{"role": "robot", "content": "x"}]}, "input[0].role: got 'robot', expected one of system"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0].type: got"),
        ({"previous_response_id": "resp_1"}, "previous_response_id: unknown or unsupported field"),
        ({"store": True}, "store: not supported"),
        ({"background": True}, "background: not supported"),
        ({"max_output_tokens": 0}, "max_output_tokens: got 0, expected an integer from 1"),
        ({"input": "x" * 200}, "tokens"),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_refused(server: Server, fields: dict[str, Any], message: str) -> None:
    status, answer, _ = ask(server, PATH, body(**fields))
    assert (status, message in answer["error"]["message"]) == (400, True), answer


def test_the_client_of_openai(server: Server) -> None:
    openai = pytest.importorskip("openai", reason="package openai is not installed; pip install openai")
    client = openai.OpenAI(base_url=server.address + "/v1", api_key="none")
    asked = {"model": "tiny", "input": "Hi", "temperature": 0, "max_output_tokens": 8}
    whole = client.responses.create(**asked)
    with client.responses.stream(**asked) as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
    assert whole.output_text == text == client.responses.create(**asked, store=False).output_text
    with pytest.raises(openai.BadRequestError, match="store: not supported"):
        client.responses.create(**asked, store=True)
