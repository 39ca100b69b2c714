"""Vectors over HTTP: those of `embed`, alone and among others; what is refused; servers of one kind of model."""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bitnet_jax.cli import serve
from bitnet_jax.inference import text_vectors
from bitnet_jax.inference.text_vectors import embed, encoder_ids
from bitnet_jax.model_folders import load_text_model
from tests.bitnet_jax.interop.sentence_folder import write
from tests.bitnet_jax.serving.tiny_models import engine

pytest.importorskip("starlette", reason="package starlette is not installed; pip install starlette")
pytest.importorskip("uvicorn", reason="package uvicorn is not installed; pip install uvicorn")
pytest.importorskip("prometheus_client", reason="package prometheus-client is not installed")

from bitnet_jax.serving import embeddings
from bitnet_jax.serving.embeddings import BATCH, Encoder
from bitnet_jax.serving.requests import Closed, QueueFull
from bitnet_jax.serving.schemas import Served
from bitnet_jax.serving.server import Server
from tests.bitnet_jax.serving.tiny_servers import CONVERSATION, TOKENIZER, ask, connection, started, until

TEXTS = ["a cat sat on the mat", "the dog barks", "a dog", "the mat", "cat cat cat"]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Any]]:
    model = load_text_model(write(tmp_path_factory.mktemp("encoder") / "model"))
    assert model.tokenizer is not None
    encoder = Encoder(model.config, model.variables, model.tokenizer, model.conversation)
    encoder.warm()
    server = started(lambda: (encoder, Served("tiny", model.tokenizer, model.conversation, encoder.context)))  # type: ignore[arg-type]
    yield server, model
    server.stop()


def vectors(server: Server, **fields: Any) -> list[Any]:
    status, answer, _ = ask(server, "/v1/embeddings", {"model": "tiny", **fields})
    assert status == 200, answer
    assert [one["index"] for one in answer["data"]] == list(range(len(answer["data"])))
    return [one["embedding"] for one in answer["data"]]


def test_a_vector_is_that_of_embed_whatever_else_is_asked(encoder: tuple[Server, Any]) -> None:
    server, model = encoder
    ids, _ = encoder_ids(model.tokenizer, model.conversation, TEXTS, 24)
    expected = embed(model.config, model.variables, ids, BATCH)
    with ThreadPoolExecutor(8) as clients:
        alone = list(clients.map(lambda text: vectors(server, input=text)[0], TEXTS * 4))
    for found in (vectors(server, input=TEXTS), alone[: len(TEXTS)], alone[len(TEXTS) : 2 * len(TEXTS)]):
        np.testing.assert_array_equal(np.array(found, np.float32), expected)
    coded = vectors(
        server, input=[one.tolist() for one in ids], encoding_format="base64", dimensions=32, user="me"
    )
    np.testing.assert_array_equal([np.frombuffer(base64.b64decode(one), "<f4") for one in coded], expected)
    _, answer, _ = ask(server, "/v1/embeddings", {"model": "tiny", "input": TEXTS[1]})
    assert answer["usage"] == {"prompt_tokens": 5, "total_tokens": 5}


def test_the_client_of_openai(encoder: tuple[Server, Any]) -> None:
    openai = pytest.importorskip("openai", reason="package openai is not installed; pip install openai")
    client = openai.OpenAI(base_url=encoder[0].address + "/v1", api_key="none")
    found = client.embeddings.create(model="tiny", input=TEXTS)  # as base64, which it decodes
    decoded, expected = [one.embedding for one in found.data], vectors(encoder[0], input=TEXTS)
    np.testing.assert_array_equal(np.array(decoded, np.float32), np.array(expected, np.float32))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "input: got None, expected a text, token ids, or a list of 1 to 2048 of either"),
        ({"input": []}, "input: got [], expected a text"),
        ({"input": ["a"] * 2049}, "expected a text, token ids, or a list of 1 to 2048"),
        ({"input": ["a", 1]}, "input: got 'a', expected token ids from 0 to 11"),
        ({"input": [3, 99]}, "input: got [3, 99], expected token ids from 0 to 11"),
        ({"input": [[]]}, "text 0: got 0 tokens"),
        ({"input": ""}, "input: got an empty text"),
        ({"input": ["a", "cat " * 30]}, "input[1]: got a text of more than 24 tokens"),
        ({"input": "a", "dimensions": 16}, "dimensions: got 16, expected an integer from 32 to 32"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format: got 'int8', expected float or base64"),
        ({"input": "a", "truncate": True}, "truncate: unknown or unsupported field"),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_refused(encoder: tuple[Server, Any], fields: dict[str, Any], message: str) -> None:
    status, answer, _ = ask(encoder[0], "/v1/embeddings", {"model": "tiny", **fields})
    assert (status, message in answer["error"]["message"]) == (400, True), answer


def test_each_kind_of_model_has_its_endpoints(encoder: tuple[Server, Any]) -> None:
    server, _ = encoder
    status, answer, _ = ask(server, "/v1/completions", {"model": "tiny", "prompt": "a", "max_tokens": 1})
    assert status == 400
    assert answer["error"]["message"] == "tiny gives vectors of texts and writes none; use /v1/embeddings"
    assert ask(server, "/health")[0] == 200
    assert ask(server, "/v1/models")[1]["data"][0]["id"] == "tiny"
    assert ask(server, "/tokenize", {"content": "a cat"})[1] == {"tokens": [4, 5]}

    serving = engine(timeout=60.0)
    writer = started(lambda: (serving, Served("tiny", TOKENIZER, CONVERSATION, serving.context)))
    status, answer, _ = ask(writer, "/v1/embeddings", {"model": "tiny", "input": "a"})
    assert (status, "serve a sentence encoder" in answer["error"]["message"]) == (400, True)
    assert ask(writer, "/slots")[1] == [{"state": "idle", "tokens_in_cache": 0}] * 3
    serving.timeout = 1e-9
    body = {"model": "tiny", "prompt": "a", "max_tokens": 9}
    status, answer, _ = ask(writer, "/v1/completions", body)
    assert (status, answer["error"]["message"]) == (504, "it took longer than 1e-09 s; request fewer tokens")
    assert '"message": "it took longer' in ask(writer, "/v1/completions", body | {"stream": True})[1]
    writer.stop()


def test_a_full_queue(encoder: tuple[Server, Any]) -> None:
    async def scenario() -> None:
        model = encoder[1]
        asked = Encoder(model.config, model.variables, model.tokenizer, model.conversation, queue_limit=1)
        ids = asked.tokens(["a"])
        async with asked._turn:
            waiting = [asyncio.create_task(asked.vectors(ids)) for _ in range(2)]
            await asyncio.sleep(0)
            with pytest.raises(QueueFull, match="1 requests wait"):
                await asked.vectors(ids)
            waiting[0].cancel()  # whoever leaves gives up the place
            await asyncio.wait(waiting[:1])
            waiting.append(asyncio.create_task(asked.vectors(ids)))
        assert [(await one).shape for one in waiting[1:]] == [(1, 32)] * 2
        asked.close()
        with pytest.raises(Closed):
            await asked.vectors(ids)

    asyncio.run(scenario())


def test_what_a_client_asked_for_ends_within_one_batch_when_it_leaves(
    encoder: tuple[Server, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At work and in the queue; the others get their vectors."""
    server, _ = encoder
    (expected,) = vectors(server, input="a dog")
    read, began, held, batches = text_vectors.padded_rows, threading.Event(), threading.Event(), []

    def holding(rows: list[np.ndarray], *sizes: int) -> Any:
        batches.append(len(rows))
        began.set()
        held.wait()
        return read(rows, *sizes)

    def embedding(*arguments: Any, before_pass: Any) -> Any:
        go_on.append(before_pass)
        return embed(*arguments, before_pass=before_pass)

    def left() -> bool:
        try:
            go_on[0]()
        except InterruptedError:
            return True
        return False

    go_on: list[Any] = []
    monkeypatch.setattr(embeddings, "embed", embedding)
    monkeypatch.setattr(text_vectors, "padded_rows", holding)
    asked = server.serving.encoder
    assert asked is not None
    body = json.dumps({"model": "tiny", "input": ["a cat"] * (5 * BATCH)})
    links = []
    for waiting in (1, 2):
        links.append(connection(server))
        links[-1].request("POST", "/v1/embeddings", body, {"Content-Type": "application/json"})
        assert until(lambda waiting=waiting: asked._asking == waiting)
    assert began.wait(20)
    for link in links:
        link.close()
    assert until(lambda: asked._asking == 1 and left())  # it has its turn until its batch is done
    held.set()
    assert vectors(server, input="a dog") == [expected]
    assert batches == [BATCH, 1]


@pytest.mark.parametrize("flag", [["--timeout", "9"], ["--context", "16"], ["--prompt-lookup", "2"]], ids=str)
def test_settings_of_the_engine_are_refused_for_an_encoder(tmp_path: Path, flag: list[str]) -> None:
    folder = str(write(tmp_path / "model"))
    with pytest.raises(
        ValueError, match=f"got {flag[0]} .* for a sentence encoder, which has no such setting"
    ):
        _run_serve([folder, "--port", "0", *flag])


def _run_serve(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    serve.run(parser.parse_args(arguments))
