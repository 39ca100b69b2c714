"""Functions and JSON in the Responses API: items of calls and their events, read by the `openai` client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("starlette", reason="package starlette is not installed; pip install starlette")
pytest.importorskip("uvicorn", reason="package uvicorn is not installed; pip install uvicorn")
pytest.importorskip("prometheus_client", reason="package prometheus-client is not installed")
pytest.importorskip("jinja2", reason="package jinja2 is not installed; pip install jinja2")

from bitnet_jax.serving.fields import Fields
from bitnet_jax.serving.messages import messages
from bitnet_jax.serving.response_items import input_messages
from bitnet_jax.serving.response_output import Output
from bitnet_jax.serving.server import Server
from bitnet_jax.serving.tool_calls import ToolCalls
from bitnet_jax.serving.tools import tools
from tests.bitnet_jax.serving.test_responses import PATH, body
from tests.bitnet_jax.serving.test_tools import NUMBER, ONE, TWO, call, tiny
from tests.bitnet_jax.serving.tiny_models import request
from tests.bitnet_jax.serving.tiny_servers import ask, started

FLAT = [{"type": "function", **tool["function"]} for tool in (ONE, TWO)]
NAMED = {"type": "function", "name": "one"}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    running = started(tiny)
    yield running
    running.stop()


@pytest.fixture
def client(server: Server) -> Iterator[Any]:
    pytest.importorskip("llguidance", reason="package llguidance is not installed; pip install llguidance")
    openai = pytest.importorskip("openai", reason="package openai is not installed; pip install openai")
    with openai.OpenAI(base_url=f"{server.address}/v1", api_key="x", max_retries=0) as client:
        yield client


def test_items_are_the_same_however_the_text_is_cut() -> None:
    text = "Sure. \n" + call("one", '{"n": 1}') + " and " + call("two", "{}") + "\n"
    for size in (1, 2, 7):
        parser, output, seen = ToolCalls(("one", "two"), request(b"x")), Output("k"), []
        for new in [*(parser.push(text[i : i + size]) for i in range(0, len(text), size)), parser.finish()]:
            seen += output.take(new)
        seen += output.finish("completed")
        said = [item.get("arguments") or item["content"][0]["text"] for item in output.items]
        assert said == ["Sure.", '{"n": 1}', " and", "{}"]
        assert [item["id"] for item in output.items] == ["msg_k0", "fc_k1", "msg_k2", "fc_k3"]
        assert [item["call_id"] for item in output.items[1::2]] == [one["id"] for one in parser.calls]
        assert {item["status"] for item in output.items} == {"completed"}
        for index, item in enumerate(output.items):
            of_item = [(kind, fields) for kind, fields in seen if fields["output_index"] == index]
            assert of_item[0][0] == "output_item.added"
            assert of_item[-1] == ("output_item.done", {"output_index": index, "item": item})
            deltas = "".join(fields["delta"] for kind, fields in of_item if kind.endswith(".delta"))
            assert deltas == said[index]
            assert {fields.get("item_id", item["id"]) for _, fields in of_item} == {item["id"]}
        # Returned as input, they are the one message of a chat that the model wrote.
        (turn,) = input_messages(Fields({"input": output.items}))
        content = "Sure. and"
        (chat,) = messages(
            Fields({"messages": [{"role": "assistant", "content": content, "tool_calls": parser.calls}]})
        )
        assert turn == chat


def test_an_answer_that_is_cut_ends_with_an_open_item() -> None:
    output = Output("k")
    first = {"index": 0, "id": "call_1", "type": "function", "function": {"name": "one", "arguments": ""}}
    kinds = [kind for kind, _ in output.take({"tool_calls": [first]})]
    assert kinds == ["output_item.added"]
    output.take({"tool_calls": [{"index": 0, "function": {"arguments": '{"n'}}]})
    output.finish("incomplete")
    (item,) = output.items
    assert (item["status"], item["arguments"]) == ("incomplete", '{"n')


def test_the_model_sees_what_it_sees_in_a_chat(server: Server) -> None:
    """The same tools, calls and results give a prompt of as many tokens, and the same answer."""
    made = {"id": "call_1", "type": "function", "function": {"name": "one", "arguments": '{"n": 3}'}}
    history = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "So", "tool_calls": [made]},
        {"role": "tool", "tool_call_id": "call_1", "content": "42"},
    ]
    items = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": [{"type": "output_text", "text": "So"}]},
        {"type": "function_call", "id": "fc_1", "call_id": "call_1", "name": "one", "arguments": '{"n": 3}'},
        {"type": "function_call_output", "call_id": "call_1", "output": [{"type": "input_text", "text": "42"}]},
    ]  # fmt: skip
    asked = {"model": "tiny", "messages": history, "temperature": 0, "max_tokens": 8, "tools": [ONE, TWO]}
    _, chat, _ = ask(server, "/v1/chat/completions", asked)
    loose = [tool | {"strict": False} for tool in FLAT]
    status, answer, _ = ask(server, PATH, body(input=items, tools=loose))
    assert status == 200, answer
    assert answer["output"][0]["content"][0]["text"] == chat["choices"][0]["message"]["content"]
    assert answer["usage"]["input_tokens"] == chat["usage"]["prompt_tokens"]
    assert (answer["tools"], answer["tool_choice"], answer["parallel_tool_calls"]) == (loose, "auto", True)


def test_functions_are_strict_unless_they_say_otherwise() -> None:
    def lark(**fields: Any) -> str | None:
        asked = tools(Fields({"tools": [FLAT[0] | fields]}), flat=True)
        assert asked is not None
        described = {name: value for name, value in (ONE["function"] | fields).items()}
        assert asked.definitions == ({"type": "function", "function": described},)
        return asked.lark

    assert lark(strict=False) is None
    assert lark() == lark(strict=True) == lark(strict=None) is not None


def test_a_call_by_the_openai_client(client: Any) -> None:
    asked = body(tools=FLAT, tool_choice=NAMED, max_output_tokens=90)
    whole = client.responses.create(**asked)
    (made,) = whole.output
    assert (whole.status, made.type, made.name, made.status) == (
        "completed",
        "function_call",
        "one",
        "completed",
    )
    assert json.loads(made.arguments).keys() == {"n"}
    assert whole.tools[0].strict is True
    assert whole.tool_choice.name == "one"
    with client.responses.stream(**asked) as stream:
        seen = list(stream)
        (streamed,) = stream.get_final_response().output
    assert (streamed.arguments, streamed.name) == (made.arguments, "one")
    kinds = [event.type.removeprefix("response.") for event in seen]
    assert kinds[2] == "output_item.added"
    assert kinds[-3:] == ["function_call_arguments.done", "output_item.done", "completed"]
    deltas = [event.delta for event in seen if event.type == "response.function_call_arguments.delta"]
    assert len(deltas) > 3
    assert "".join(deltas) == made.arguments == seen[-3].arguments
    result = {"type": "function_call_output", "call_id": made.call_id, "output": "42"}
    history = [{"role": "user", "content": "Hi"}, *whole.output, result]
    asked |= {"input": history, "tool_choice": "none", "max_output_tokens": 2}
    assert [item.type for item in client.responses.create(**asked).output] == ["message"]


def test_json_by_the_openai_client(client: Any) -> None:
    pydantic = pytest.importorskip(
        "pydantic", reason="package pydantic is not installed; pip install pydantic"
    )
    bounds = pydantic.Field(ge=0, le=99)
    number_type = pydantic.create_model("Answer", n=(int, bounds))
    asked = body(max_output_tokens=60)
    parsed = client.responses.parse(text_format=number_type, **asked)
    assert parsed.status == "completed"
    assert 0 <= parsed.output_parsed.n <= 99
    assert parsed.text.format.name == "Answer"
    form = {"type": "json_schema", "name": "number", "schema": NUMBER}
    whole = client.responses.create(text={"format": form, "verbosity": "medium"}, **asked)
    assert json.loads(whole.output_text).keys() == {"n"}
    with client.responses.stream(text_format=number_type, **asked) as stream:
        assert stream.get_final_response().output_parsed == parsed.output_parsed


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tools": [ONE]}, "tools[0].name: got None, expected 1 to 64 letters"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type: got 'web_search', expected function"),
        ({"tools": FLAT, "tool_choice": ONE}, "tool_choice.name: got None"),
        ({"tools": FLAT, "tool_choice": NAMED | {"name": "x"}}, "tool_choice: got 'x', expected one of one, two"),
        ({"tools": FLAT, "parallel_tool_calls": 1}, "parallel_tool_calls: got 1"),
        ({"tools": FLAT, "text": {"format": {"type": "json_object"}}}, "text.format: got JSON together with tools"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type: got 'xml'"),
        ({"text": {"format": {"type": "json_schema", "json_schema": {}}}}, "text.format.name: got None"),
        ({"text": {"verbosity": "low"}}, "text.verbosity: not supported"),
        ({"text": "json"}, "text: got 'json', expected an object with format"),
        ({"input": [{"type": "function_call_output", "call_id": "a", "output": ""}]},
         "input[0].call_id: got 'a', expected that of an earlier function_call"),
        ({"input": [{"type": "function_call", "call_id": "a", "name": "x", "arguments": "["}]},
         "input[0].arguments: got '[', expected an object as JSON text"),
        ({"input": [{"type": "function_call", "name": "x"}]}, "input[0].call_id: got None"),
        ({"input": [{"type": "function_call", "call_id": "a", "name": "x", "role": "user"}]}, "input[0].role: unknown"),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_refused(server: Server, fields: dict[str, Any], message: str) -> None:
    status, answer, _ = ask(server, PATH, body(**fields))
    assert (status, message in answer["error"]["message"]) == (400, True), answer


def test_a_template_without_tools_is_refused_in_words() -> None:
    plain = started()
    status, answer, _ = ask(plain, PATH, body(tools=FLAT))
    plain.stop()
    assert (status, "does not mention tools" in answer["error"]["message"]) == (400, True)
