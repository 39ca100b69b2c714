"""The OpenAPI document of the server: its endpoints, bodies (openapi_bodies.py) and answers."""

from __future__ import annotations

from typing import Any

from bitnet_jax.serving import openapi_bodies as bodies
from bitnet_jax.serving.openapi_bodies import Schema, list_of
from bitnet_jax.serving.schemas import Served

ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


def document(served: Served) -> dict[str, Any]:
    """OpenAPI 3.1 of the server of this model."""
    answer: Schema = {"type": "object", "required": ["object"]}

    def operation(
        summary: str, *, of: Schema | None = None, gives: Schema = answer, stream: bool = False
    ) -> Any:
        content = {"application/json": {"schema": gives}}
        if stream:
            content["text/event-stream"] = {"schema": {"type": "string"}}
        error = {"description": "error", "content": {"application/json": {"schema": ERROR}}}
        found: dict[str, Any] = {
            "summary": summary,
            "responses": {"200": {"description": summary, "content": content}, "default": error},
        }
        if of is not None:
            found["requestBody"] = {"required": True, "content": {"application/json": {"schema": of}}}
        return found

    name = {"name": "name", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
    tokens = {"type": "object", "required": ["tokens"], "properties": {"tokens": bodies.tokens(served)}}
    content = {"type": "object", "required": ["content"], "properties": {"content": {"type": "string"}}}
    paths = {
        "/v1/models": {"get": operation("the one model")},
        "/v1/models/{name}": {"get": operation("the model of this name") | {"parameters": [name]}},
        "/v1/chat/completions": {
            "post": operation("answers to messages", of=bodies.chat(served), stream=True)
        },
        "/v1/completions": {"post": operation("continuations of texts", of=bodies.text(served), stream=True)},
        "/v1/responses": {
            "post": operation("an answer to messages", of=bodies.response(served), stream=True)
        },
        "/v1/embeddings": {"post": operation("vectors of texts", of=bodies.vectors(served))},
        "/tokenize": {"post": operation("tokens of a text", of=bodies.tokenize(), gives=tokens)},
        "/detokenize": {"post": operation("text of tokens", of=bodies.detokenize(served), gives=content)},
        "/health": {
            "get": operation("whether the model is loaded", gives={"type": "object", "required": ["status"]})
        },
        "/slots": {"get": operation("what each slot does", gives=list_of({"type": "object"}))},
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "bitnet-jax serve", "version": "1"},
        "components": {"securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
        "security": [{}, {"key": []}],
        "paths": paths,
    }
