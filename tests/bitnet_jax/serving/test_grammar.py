"""Answers that follow a JSON schema, over HTTP: by a model with random weights, whose free text is noise."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

pytest.importorskip("starlette", reason="package starlette is not installed; pip install starlette")
pytest.importorskip("uvicorn", reason="package uvicorn is not installed; pip install uvicorn")
pytest.importorskip("prometheus_client", reason="package prometheus-client is not installed")
pytest.importorskip("jinja2", reason="package jinja2 is not installed; pip install jinja2")
pytest.importorskip("llguidance", reason="package llguidance is not installed; pip install llguidance")

from bitnet_jax.data.tokenizers import from_json
from bitnet_jax.inference.sampling import SamplingConfig
from bitnet_jax.serving.grammar import GrammarError, Grammars, Progress, json_answer
from bitnet_jax.serving.server import Server
from tests.bitnet_jax.chat_folders import SIZE, tokenizer_json
from tests.bitnet_jax.serving.tiny_models import TOKENIZER, answers, end, engine, request, text, timeless
from tests.bitnet_jax.serving.tiny_servers import ask, started

PERSON = {
    "type": "object",
    "properties": {"age": {"type": "integer", "maximum": 999}, "kind": {"enum": ["cat", "dog é"]}},
    "required": ["age", "kind"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    running = started()
    yield running
    running.stop()


def chat(server: Server, schema: Any, status: int = 200, **fields: Any) -> Any:
    format = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "Hi"}],
        "response_format": format,
        "max_tokens": 100,
        **fields,
    }
    got, answer, _ = ask(server, "/v1/chat/completions", body)
    assert got == status, answer
    return answer if status == 200 else answer["error"]["message"]


def test_every_choice_is_a_value_of_the_schema(server: Server) -> None:
    for choice in chat(server, PERSON, n=4, seed=3)["choices"]:
        value = json.loads(choice["message"]["content"])
        assert choice["message"]["content"] == json.dumps(value, ensure_ascii=False)
        assert isinstance(value["age"], int)
        assert value["kind"] in PERSON["properties"]["kind"]["enum"]  # type: ignore[index]
        assert choice["finish_reason"] == "stop"  # no token ends it: nothing may follow
    (cut,) = chat(server, PERSON, max_tokens=5)["choices"]
    assert (cut["message"]["content"], cut["finish_reason"]) == ('{"age', "length")


def test_any_object(server: Server) -> None:
    format = {"type": "json_object"}
    (choice,) = chat(server, None, response_format=format, max_tokens=30, seed=1)["choices"]
    assert choice["message"]["content"].startswith("{")
    assert choice["finish_reason"] == "length" or isinstance(json.loads(choice["message"]["content"]), dict)


@pytest.mark.parametrize("precision", ["bitnet_b158", "float32"])
def test_sixteen_at_once_are_what_each_is_alone(precision: str) -> None:
    """Greedy and seeded, with a schema and without, with bias and penalties; rows that are exact, and others."""
    grammar, serving = Grammars(TOKENIZER, (0,)).compile(json_answer(PERSON)), engine(precision)
    wanted = [
        request(
            b"client %d" % i,
            16,
            seed=i,
            sampling=SamplingConfig(temperature=1.0) if i % 2 else SamplingConfig(),
            presence_penalty=i % 3 / 2,
            bias=((49, 5.0),) if i % 4 == 0 else (),
            grammar=None if i % 5 == 0 else grammar,
            end=(0,),
        )
        for i in range(16)
    ]
    together = [timeless(events) for events in answers(serving, *wanted)]
    assert together == [timeless(*answers(serving, one)) for one in wanted]
    assert len({text(events) for events in together}) > 8


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "objec"}, "response_format: Invalid type: objec"),
        ({"type": "array", "uniqueItems": True}, 'response_format: Unimplemented keys: ["uniqueItems"]'),
        ({"enum": []}, "response_format: Unsatisfiable schema"),
        ({"$ref": "https://example.com/schema"}, "response_format: Resource"),
        ({"enum": ["x" * 70_000]}, "characters, expected at most 65536"),
        ({"x-guidance": {"lenient": True}, "not": {"type": "string"}}, 'Unimplemented keys: ["not"]'),
        ([], "response_format.json_schema.schema: got []"),
    ],
)
def test_a_schema_that_cannot_be_kept_is_refused_in_one_line(
    server: Server, schema: Any, message: str
) -> None:
    got = chat(server, schema, 400)
    assert message in got
    assert "\n" not in got


def test_a_deep_schema_and_other_formats_are_refused(server: Server) -> None:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(100):
        schema = {"type": "array", "items": schema}
    assert "expected fewer; flatten the schema" in chat(server, schema, 400)
    assert "type: got 'grammar'" in chat(server, None, 400, response_format={"type": "grammar"})


def test_without_the_package_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    bare = started()
    assert "pip install llguidance" in chat(bare, PERSON, 400)
    bare.stop()


@pytest.mark.parametrize("ends", [(258,), ()])
def test_special_tokens_are_no_text(ends: tuple[int, ...]) -> None:
    """Of a tokenizer.json, in a model with more rows than tokens: they cannot be written in a string, only end it."""
    tokenizer = from_json(tokenizer_json())
    progress = Grammars(tokenizer, ends).compile(json_answer({"type": "string"})).start()
    for token in tokenizer.encode('"\u00e9<'):
        assert progress.mask(SIZE + 9)[token] == 0
        assert not progress.advance(token)
    assert np.isneginf(progress.mask(SIZE + 9)[256:]).all()
    assert progress.advance(ord('"'))


@pytest.mark.parametrize("drafted", [0, 4])
def test_a_matcher_that_fails_ends_its_own_answer_only(monkeypatch: pytest.MonkeyPatch, drafted: int) -> None:
    grammar = Grammars(TOKENIZER, (0,)).compile(json_answer(PERSON))
    serving = engine(prompt_lookup=drafted)
    wanted = [request(b"one", 40, grammar=grammar, end=(0,)), request(b"two", 12)]
    (alone,) = answers(serving, wanted[0])
    (other,) = answers(serving, wanted[1])
    assert json.loads(text(alone)).keys() == {"age", "kind"}
    assert end(alone).reason == "stop"
    advance, calls = Progress.advance, []

    def failing(self: Progress, token: int) -> bool:
        calls.append(token)
        if len(calls) == 5:
            raise GrammarError("too much work")
        return advance(self, token)

    monkeypatch.setattr(Progress, "advance", failing)
    broken, beside = answers(serving, *wanted)
    assert (end(broken).reason, end(broken).message) == ("grammar", "too much work")
    assert timeless(beside) == timeless(other)
