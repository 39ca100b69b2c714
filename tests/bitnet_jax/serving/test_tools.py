"""Calls of tools: recognised however the text is cut, required by a grammar, and read by the `openai` client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

pytest.importorskip("starlette", reason="package starlette is not installed; pip install starlette")
pytest.importorskip("uvicorn", reason="package uvicorn is not installed; pip install uvicorn")
pytest.importorskip("prometheus_client", reason="package prometheus-client is not installed")
pytest.importorskip("jinja2", reason="package jinja2 is not installed; pip install jinja2")

from bitnet_jax.data.conversation import Conversation
from bitnet_jax.serving.engine import Engine
from bitnet_jax.serving.fields import Fields
from bitnet_jax.serving.grammar import Grammars
from bitnet_jax.serving.schemas import Served
from bitnet_jax.serving.server import Server
from bitnet_jax.serving.tool_calls import ToolCalls
from bitnet_jax.serving.tools import tools
from tests.bitnet_jax.serving.tiny_models import TOKENIZER, engine, request
from tests.bitnet_jax.serving.tiny_servers import ask, started

TEMPLATE = """\
{% for tool in tools or [] %}{{ tool.function.name }} {% endfor %}
{%- for m in messages %}<{{ m.role }}>{{ m.content }}
{%- for call in m.tool_calls or [] %}{{ call.function.arguments | tojson }}{% endfor %}
{%- endfor %}<a>"""
NUMBER = {"type": "object", "properties": {"n": {"type": "integer", "maximum": 99, "minimum": 0}},
          "required": ["n"], "additionalProperties": False}  # fmt: skip
ONE: dict[str, Any] = {
    "type": "function",
    "function": {"name": "one", "description": "The first.", "parameters": NUMBER},
}
TWO = {"type": "function", "function": {"name": "two"}}


def tiny() -> tuple[Engine, Served]:
    serving = engine()
    return serving, Served("tiny", TOKENIZER, Conversation(end=(0,), template=TEMPLATE), serving.context)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    running = started(tiny)
    yield running
    running.stop()


@pytest.fixture
def grammars() -> None:
    pytest.importorskip("llguidance", reason="package llguidance is not installed; pip install llguidance")


def call(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


def read(text: str, size: int) -> tuple[str, list[dict[str, Any]], ToolCalls]:
    """Content and calls as a client puts them together from pieces of a text."""
    parser, content, calls = ToolCalls(("one", "two"), request(b"x", seed=7)), "", []
    pieces = [text[i : i + size] for i in range(0, len(text), size)]
    for new in [*map(parser.push, pieces), parser.finish()]:
        content += new.get("content", "")
        for delta in new.get("tool_calls", ()):
            if delta["index"] == len(calls):
                assert delta.keys() == {"index", "id", "type", "function"}
                calls.append({"name": delta["function"]["name"], "arguments": ""})
            else:
                assert (delta["index"], delta.keys()) == (len(calls) - 1, {"index", "function"})
            calls[-1]["arguments"] += delta["function"]["arguments"]
    assert [one["function"] for one in parser.calls] == calls
    return content, [(one["name"], one["arguments"]) for one in calls], parser


BAD = {"name": "x", "arguments": "["}
BRACES = '{"a": "} \\" {</tool_call>", "b": [{}, {"c": 1}]}'


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ("Hello <b>", "Hello <b>", []),
        ("Sure. \n" + call("one", '{"n": 1}'), "Sure.", [("one", '{"n": 1}')]),
        (call("one", BRACES) + "\n" + call("two", "{}") + "\n", "", [("one", BRACES), ("two", "{}")]),
        ('<tool_call>{"name":"two","arguments":{}}</tool_call> ok', " ok", [("two", "{}")]),
        (call("three", "{}") + "!", call("three", "{}") + "!", []),
        ("<tool_call>\nnot JSON</tool_call> x <tool", "<tool_call>\nnot JSON</tool_call> x <tool", []),
        (call("one", '{"n": 12')[:49], "", [("one", '{"n": 12')]),
        ('a <tool_call>\n{"name": "on', 'a <tool_call>\n{"name": "on', []),
    ],
)
def test_text_is_the_same_calls_however_it_is_cut(
    text: str, content: str, calls: list[tuple[str, str]]
) -> None:
    for size in (1, 2, 7, 1000):
        got, found, parser = read(text, size)
        assert (got, found) == (content, calls)
        assert len({one["id"] for one in parser.calls}) == len(calls)


def body(**fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "tools": [ONE, TWO], **fields}


@pytest.mark.usefixtures("grammars")
def test_a_required_call_by_the_openai_client(server: Server) -> None:
    openai = pytest.importorskip("openai", reason="package openai is not installed; pip install openai")
    client = openai.OpenAI(base_url=f"{server.address}/v1", api_key="x", max_retries=0)
    named = {"type": "function", "function": {"name": "one"}}
    asked = {**body(tool_choice=named), "seed": 3, "max_tokens": 90}
    (choice,) = client.chat.completions.create(**asked).choices
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
    (made,) = choice.message.tool_calls
    assert made.function.name == "one"
    assert json.loads(made.function.arguments).keys() == {"n"}
    pieces = [chunk.choices[0] for chunk in client.chat.completions.create(stream=True, **asked)]
    assert pieces[0].delta.role == "assistant"
    assert pieces[-1].finish_reason == "tool_calls"
    deltas = [delta for piece in pieces for delta in piece.delta.tool_calls or ()]
    assert [(delta.index, delta.id) for delta in deltas] == [(0, made.id)] + [(0, None)] * (len(deltas) - 1)
    assert "".join(delta.function.arguments for delta in deltas) == made.function.arguments
    assert len(deltas) > 3
    history = [
        *asked["messages"],
        choice.message,
        {"role": "tool", "tool_call_id": made.id, "content": "42"},
    ]
    asked |= {"messages": history, "tool_choice": "none", "max_tokens": 2}
    assert client.chat.completions.create(**asked).choices[0].message.tool_calls is None


@pytest.mark.usefixtures("grammars")
@pytest.mark.parametrize(
    ("fields", "least"), [({"tool_choice": "required"}, 1), ({"parallel_tool_calls": False}, 0)]
)
def test_grammars_of_several_tools(server: Server, fields: dict[str, Any], least: int) -> None:
    """Where text may come first, the model with random weights writes no calls; it must not fail."""
    status, answer, _ = ask(server, "/v1/chat/completions", body(n=2, seed=1, max_tokens=100, **fields))
    assert status == 200, answer
    for choice in answer["choices"]:
        calls = choice["message"].get("tool_calls", [])
        assert len(calls) >= least
        assert {made["function"]["name"] for made in calls} <= {"one", "two"}


@pytest.mark.usefixtures("grammars")
def test_where_text_may_come_first_a_strict_call_keeps_to_its_schema() -> None:
    strict = ONE | {"function": ONE["function"] | {"strict": True}}
    asked = tools(Fields({"tools": [strict, TWO]}))
    assert asked is not None
    assert asked.lark is not None
    progress = Grammars(TOKENIZER, (0,)).compile(asked.lark).start()
    allowed = {}
    for byte in b'<b> <tool_call>\n{"name": "one", "arguments": {"n": 7}}\n</tool_call> 7':
        allowed[len(allowed)] = progress.mask(256) == 0
        assert allowed[len(allowed) - 1][byte]
        assert not progress.advance(byte)
    text, number = allowed[2], allowed[len(b'<b> <tool_call>\n{"name": "one", "arguments": {"n": ')]
    assert bytes(np.flatnonzero(number).tolist()) == b"0123456789"
    assert text[0]  # the end
    assert text[32:127].all()
    assert progress.mask(256)[0] == 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tools": [ONE, ONE]}, "tools: got two functions with one name"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "function.name: got 'a b'"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type: got 'web_search'"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice: got a call without tools"),
        ({"tool_choice": {"type": "function", "function": {"name": "x"}}}, "expected one of one, two"),
        ({"tool_choice": "any"}, "tool_choice: got 'any'"),
        ({"response_format": {"type": "json_object"}}, "got JSON together with tools"),
        ({"messages": [{"role": "tool", "tool_call_id": "a", "content": ""}]}, "that of an earlier call"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"id": "a", "function": BAD}]}]},
            "messages[0].tool_calls[0].function.arguments: got '['",
        ),
    ],
)  # fmt: skip
def test_what_is_refused(server: Server, fields: dict[str, Any], message: str) -> None:
    status, answer, _ = ask(server, "/v1/chat/completions", body(**fields))
    assert (status, message in answer["error"]["message"]) == (400, True), answer


def test_a_template_without_tools_is_refused_in_words() -> None:
    plain = started()
    status, answer, _ = ask(plain, "/v1/chat/completions", body())
    plain.stop()
    assert status == 400
    assert "does not mention tools" in answer["error"]["message"]
