"""The OpenAPI document: its fields are those that bodies may have, and the server keeps to it under fuzzing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("starlette", reason="package starlette is not installed; pip install starlette")
pytest.importorskip("uvicorn", reason="package uvicorn is not installed; pip install uvicorn")
pytest.importorskip("prometheus_client", reason="package prometheus-client is not installed")
pytest.importorskip("jinja2", reason="package jinja2 is not installed; pip install jinja2")

from bitnet_jax.serving.server import Server
from tests.bitnet_jax.serving.tiny_servers import ask, started


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    running = started()
    yield running
    running.stop()


def bodies(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Path -> the properties of its body."""
    found = {path: item["post"]["requestBody"] for path, item in document["paths"].items() if "post" in item}
    return {path: body["content"]["application/json"]["schema"]["properties"] for path, body in found.items()}


def test_every_endpoint_exists_and_every_field_is_known(server: Server) -> None:
    _, document, _ = ask(server, "/openapi.json")
    for path, item in document["paths"].items():
        body = {} if "post" in item else None
        assert ask(server, path.format(name="tiny"), body)[0] in (200, 400), path
    unlike = {"stream_options": {"include_usage": True}, "temperature": 1.5, "top_p": 0.5}
    for path, fields in bodies(document).items():
        if path == "/v1/embeddings":
            continue  # of an encoder
        for name in fields:
            body = {"model": "tiny", "prompt": "x", "messages": [{"role": "user", "content": "x"}], "content": "x",
                    "tokens": [1], "max_tokens": 2, name: unlike.get(name)}  # fmt: skip
            needed = {"model", "prompt", "messages", "content", "tokens", "max_tokens"} & fields.keys()
            sent = {key: body[key] for key in needed if body[key] is not None} | {name: body[name]}
            status, answer, _ = ask(server, path, sent)
            assert "unknown" not in str(answer), (path, name, answer)
            assert status in (200, 400)


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
