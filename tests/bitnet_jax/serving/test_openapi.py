"""The OpenAPI document: it says which bodies are accepted, and the server keeps to it under fuzzing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette", reason="package starlette is not installed; pip install starlette")
pytest.importorskip("uvicorn", reason="package uvicorn is not installed; pip install uvicorn")
pytest.importorskip("prometheus_client", reason="package prometheus-client is not installed")
pytest.importorskip("jinja2", reason="package jinja2 is not installed; pip install jinja2")

from bitnet_jax.model_folders import load_text_model
from bitnet_jax.serving.embeddings import Encoder
from bitnet_jax.serving.schemas import Served
from bitnet_jax.serving.server import Server
from tests.bitnet_jax.interop.sentence_folder import write
from tests.bitnet_jax.serving import test_tools
from tests.bitnet_jax.serving.tiny_servers import ask, started


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    running = started(test_tools.tiny)
    yield running
    running.stop()


def test_every_endpoint_exists(server: Server) -> None:
    _, document, _ = ask(server, "/openapi.json")
    for path, item in document["paths"].items():
        body = {} if "post" in item else None
        assert ask(server, path.format(name="tiny"), body)[0] in (200, 400), path


HI = {"role": "user", "content": "x"}
CALL = {"id": "a", "type": "function", "function": {"name": "one", "arguments": "{}"}}
RESULT = {"role": "tool", "tool_call_id": "a", "content": [{"type": "text", "text": "x"}]}
ITEM = {"type": "function_call", "call_id": "a", "name": "one", "arguments": "{}"}
OUTPUT = {"type": "function_call_output", "call_id": "a", "output": "x"}
FLAT = {"type": "function", "name": "one", "strict": False}
SAMPLED: dict[str, list[Any]] = {
    "temperature": [0, 1.5, None], "top_p": [0, 1], "max_tokens": [1, None], "stop": ["a", [], ["a", "b"], None],
    "seed": [0, -1, 2**64 - 1, None], "n": [1, 2, None], "stream": [False, None], "stream_options": [{}, None],
    "logit_bias": [{}, {"7": -100.0}, None], "presence_penalty": [0, -2, None], "frequency_penalty": [0.0, 2],
    "user": ["", "me", None], "never_heard_of": [None],
}  # fmt: skip
NOT_SAMPLED: dict[str, list[Any]] = {
    "temperature": [-1, 2.5, "1", True], "top_p": [1.5], "max_tokens": [-1, 2**31, "1", 0.5], "stop": ["", [""], 1],
    "seed": [2**64, "1"], "n": [0, 129], "stream": [1], "stream_options": [[], {"x": 1}],
    "logit_bias": [{"a": 1}, {"-1": 1}, {"1": None}, {"1": 101}, []], "presence_penalty": [3],
    "frequency_penalty": ["0"], "user": [1], "never_heard_of": [0, False, "", [], {}],
}  # fmt: skip
TEXT = {"model": "tiny", "prompt": "x", "max_tokens": 1}
CHAT = {"model": "tiny", "messages": [HI], "max_tokens": 1}
RESPONSE = {"model": "tiny", "input": "x", "max_output_tokens": 1}
TOKENS = {"model": "tiny", "input": "a cat"}
# Path, a body that is accepted, and for its fields values that are accepted and values that are refused.
BODIES: list[tuple[str, dict[str, Any], dict[str, list[Any]], dict[str, list[Any]]]] = [
    ("/v1/completions", TEXT, SAMPLED | {
        "prompt": ["x", [1, 2], ["x", [1]]], "echo": [False, True, None], "logprobs": [0, 20, None],
        "best_of": [1, None], "suffix": ["", None],
    }, NOT_SAMPLED | {
        "prompt": [None, "", [], [[]], [256], ["x", 1], [-1], {}, 1], "echo": ["yes"], "logprobs": [21, True],
        "best_of": [2, True], "suffix": ["x"], "model": ["other", None], "messages": [[HI]],
    }),
    ("/v1/chat/completions", CHAT, SAMPLED | {
        "messages": [[HI], [HI | {"name": None}], [HI | {"content": []}], [{"role": "developer", "content": "x"}, HI],
                     [{"role": "assistant", "tool_calls": [CALL], "refusal": None}, RESULT],
                     [{"role": "assistant", "content": "x", "tool_calls": []}]],
        "max_completion_tokens": [5, None], "logprobs": [False, True], "top_logprobs": [0, None],
        "store": [False, None], "modalities": [["text"], None], "service_tier": ["auto", "default", None],
        "tools": [[], [test_tools.ONE], None], "tool_choice": ["none", "auto", None],
        "parallel_tool_calls": [True, False, None],
        "response_format": [{"type": "text"}, {"type": "text", "json_schema": None}, None],
    }, NOT_SAMPLED | {
        "messages": [None, [], "x", [1], [{"role": "user"}], [HI | {"name": "me"}], [HI | {"role": "robot"}],
                     [HI | {"tool_calls": []}], [{"role": "assistant", "tool_calls": []}],
                     [HI | {"tool_call_id": "a"}], [HI | {"content": [{"type": "image_url"}]}],
                     [{"role": "assistant", "content": "x", "refusal": "no"}]],
        "max_completion_tokens": [0], "logprobs": [1], "top_logprobs": [21, -1], "store": [True, 0],
        "modalities": [["audio"], "text"], "service_tier": ["flex"], "tools": [{}, [FLAT], [{"type": "web_search"}]],
        "tool_choice": ["any", {"type": "function", "name": "one"}], "parallel_tool_calls": [1],
        "response_format": ["text", {"type": "xml"}, {"type": "json_schema"}, {"type": "text", "json_schema": {}}],
        "max_tokens": [0], "prompt": ["x"], "functions": [[]],
    }),
    ("/v1/responses", RESPONSE, {
        "input": ["x", [HI], [HI | {"type": "message", "id": None}], [ITEM, OUTPUT],
                  [HI | {"content": [{"type": "input_text", "text": "x", "annotations": []}]}]],
        "instructions": ["", "Be.", None], "max_output_tokens": [1, None], "temperature": [0, 2, None], "top_p": [1],
        "stream": [False, None], "store": [False, None], "user": ["me", None], "background": [False],
        "include": [[], None], "service_tier": ["auto"], "stream_options": [{}, {"include_obfuscation": False}],
        "top_logprobs": [0], "truncation": ["disabled"], "tools": [[], [FLAT], None],
        "tool_choice": ["none", "auto", None], "parallel_tool_calls": [True, False], "reasoning": [None],
        "text": [{}, {"format": {"type": "text"}, "verbosity": "medium"}, {"format": None}, None],
    }, {
        "input": [None, [], 1, [{"role": "user"}], [{"type": "reasoning"}], [HI | {"role": "tool"}],
                  [ITEM | {"call_id": None}], [HI | {"content": [{"type": "text", "text": "x"}]}],
                  [HI | {"content": [{"type": "input_text", "text": "x", "annotations": [1]}]}]],
        "instructions": [1], "max_output_tokens": [0, True], "temperature": [3], "store": [True, 0],
        "background": [True], "include": [["x"], {}], "top_logprobs": [1], "truncation": ["auto"],
        "tools": [[test_tools.ONE], {}],
        "tool_choice": ["any", {"type": "function", "function": {"name": "one"}}], "reasoning": [{}], "metadata": [{}],
        "text": ["json", {"verbosity": "low"}, {"format": {"type": "json_schema", "json_schema": {}}}],
        "seed": [1], "max_tokens": [1], "previous_response_id": ["resp_1"],
    }),
    ("/tokenize", {"content": "x"}, {"content": ["", "x"], "add_special": [True, None]},
     {"content": [None, 1], "add_special": [1], "text": ["x"]}),
    ("/detokenize", {"tokens": [1]}, {"tokens": [[], [0, 255]]}, {"tokens": [None, [256], [-1], ["x"], [0.5]]}),
]  # fmt: skip
OF_AN_ENCODER = [
    ("/v1/embeddings", TOKENS, {
        "input": ["a cat", [4, 5], ["a", "cat"], [[4], [5, 4]]], "encoding_format": ["float", "base64", None],
        "dimensions": [32, None], "user": ["me", None],
    }, {
        "input": [None, "", [], [[]], [""], ["a", [4]], [4, "a"], [12], 1], "encoding_format": ["int8"],
        "dimensions": [0], "user": [1], "truncate": [False],
    }),
]  # fmt: skip


def agree(server: Server, bodies: Any) -> None:
    jsonschema = pytest.importorskip("jsonschema", reason="no package jsonschema: pip install jsonschema")
    _, document, _ = ask(server, "/openapi.json")
    for path, base, accepted, refused in bodies:
        schema = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        jsonschema.Draft202012Validator.check_schema(schema)
        validator = jsonschema.Draft202012Validator(schema)
        # Values that are accepted are so together: the first ones of all fields, the second ones, and so on.
        for i in range(max(map(len, accepted.values()))):
            body = base | {name: values[i % len(values)] for name, values in accepted.items()}
            status, answer, _ = ask(server, path, body)
            assert (status, list(validator.iter_errors(body))) == (200, []), (path, answer)
        for name, values in refused.items():
            for value in values:
                body = base | {name: value}
                status, answer, _ = ask(server, path, body)
                assert (status in (400, 404), validator.is_valid(body)) == (True, False), (
                    path,
                    name,
                    value,
                    answer,
                )
        unlisted = schema["properties"].keys() - (accepted | refused).keys()
        assert not unlisted - {"model"}, path


@pytest.mark.extended
def test_what_the_document_says_is_what_the_server_accepts(server: Server) -> None:
    agree(server, BODIES)


def test_the_same_of_an_encoder(tmp_path: Path) -> None:
    model = load_text_model(write(tmp_path / "model"))
    assert model.tokenizer is not None
    encoder = Encoder(model.config, model.variables, model.tokenizer, model.conversation)
    served = Served("tiny", model.tokenizer, model.conversation, encoder.context)
    running = started(lambda: (encoder, served))  # type: ignore[arg-type]
    try:
        agree(running, OF_AN_ENCODER)
    finally:
        running.stop()


@pytest.mark.slow
def test_the_server_keeps_to_its_document_under_fuzzing(server: Server) -> None:
    schemathesis = pytest.importorskip("schemathesis", reason="package schemathesis is not installed")
    hypothesis = pytest.importorskip("hypothesis", reason="package hypothesis is not installed")
    schema = schemathesis.openapi.from_url(server.address + "/openapi.json")
    checks = [
        schemathesis.checks.not_a_server_error,
        *(schemathesis.specs.openapi.checks.__dict__[name] for name in (
            "status_code_conformance", "content_type_conformance", "response_schema_conformance")),
    ]  # fmt: skip
    settings = hypothesis.settings(
        max_examples=40, deadline=None, suppress_health_check=list(hypothesis.HealthCheck), derandomize=True,
        database=None,
    )  # fmt: skip
    seen = 0
    for found in schema.get_all_operations():
        operation = found.ok()

        @hypothesis.given(case=operation.as_strategy())
        @settings
        def fuzz(case: Any) -> None:
            nonlocal seen
            seen += 1
            case.call_and_validate(base_url=server.address, checks=checks)

        fuzz()
    assert seen > 100
