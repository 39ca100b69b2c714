"""The OpenAPI document of the server: endpoints, the fields of their bodies with types and ranges, answers."""

from __future__ import annotations

from typing import Any

from bitnet_jax.serving.embeddings import MOST_INPUTS
from bitnet_jax.serving.messages import ROLES
from bitnet_jax.serving.passes import TOP
from bitnet_jax.serving.response_items import PARTS
from bitnet_jax.serving.response_items import ROLES as RESPONSE_ROLES
from bitnet_jax.serving.schemas import (
    MAX_ANSWERS,
    MAX_BIASES,
    MAX_STOP_LENGTH,
    MAX_STOPS,
    Served,
)
from bitnet_jax.serving.tools import CHOICES, MAX_TOOLS

Schema = dict[str, Any]


def _field(kind: str, **more: Any) -> Schema:
    """null counts as absent."""
    return {"type": [kind, "null"], **more}


def _object(required: list[str], **properties: Schema) -> Schema:
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _list(of: Schema, **more: Any) -> Schema:
    return {"type": "array", "items": of, **more}


TEXT: Schema = {"type": "string", "minLength": 1}
NAME: Schema = {"type": "string", "pattern": "^[A-Za-z0-9_-]{1,64}$"}
TOKENS = _list({"type": "integer", "minimum": 0})
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
LARGEST = 2**31 - 1


def _sampled(most: str) -> dict[str, Schema]:
    """The fields that both kinds of completion have."""
    return {
        "temperature": _field("number", minimum=0, maximum=2, default=1, description="0 is greedy"),
        "top_p": _field("number", minimum=0, maximum=1, default=1),
        "max_tokens": _field("integer", minimum=1, maximum=LARGEST, description=most),
        "stop": {
            "anyOf": [
                _field("string", minLength=1, maxLength=MAX_STOP_LENGTH),
                _list({"type": "string", "minLength": 1, "maxLength": MAX_STOP_LENGTH}, maxItems=MAX_STOPS),
            ]
        },
        "seed": _field("integer", minimum=-(2**63), maximum=2**64 - 1),
        "n": _field("integer", minimum=1, maximum=MAX_ANSWERS, default=1),
        "stream": _field("boolean", default=False),
        "stream_options": {
            "anyOf": [_object([], include_usage=_field("boolean")), {"type": "null"}],
            "description": "in a stream only",
        },
        "logit_bias": _field(
            "object",
            maxProperties=MAX_BIASES,
            propertyNames={"pattern": "^[0-9]{1,9}$"},
            additionalProperties={"type": "number", "minimum": -100, "maximum": 100},
        ),
        "presence_penalty": _field("number", minimum=-2, maximum=2, default=0),
        "frequency_penalty": _field("number", minimum=-2, maximum=2, default=0),
        "user": _field("string", description="clients take turns by it"),
    }


def _function() -> dict[str, Schema]:
    """The fields of a function that may be called."""
    return {
        "name": NAME,
        "description": _field("string"),
        "parameters": _field("object", description="a JSON schema"),
        "strict": _field("boolean"),
    }


def _json_schema() -> dict[str, Schema]:
    """The fields of the schema of an answer."""
    return {
        "name": NAME,
        "description": _field("string"),
        "schema": {"type": "object"},
        "strict": _field("boolean"),
    }


def _chat(model: Schema) -> Schema:
    part = _object(["type", "text"], type={"const": "text"}, text={"type": "string"})
    content = {"anyOf": [{"type": "string"}, _list(part)]}
    function = _object(["name", "arguments"], name=NAME, arguments={"type": "string"})
    call = _object(["id", "function"], id=TEXT, type={"const": "function"}, function=function)
    message = _object(
        ["role"],
        role={"enum": list(ROLES)},
        content=content | {"description": "may be absent beside tool_calls only"},
        tool_calls=_list(call, description="of an assistant"),
        tool_call_id={"type": "string", "description": "of a tool"},
    )
    tool = _object(
        ["type", "function"], type={"const": "function"}, function=_object(["name"], **_function())
    )
    named = _object(["type", "function"], type={"const": "function"}, function=_object(["name"], name=NAME))
    schema = _object(["name", "schema"], **_json_schema())
    return _object(
        ["model", "messages"],
        model=model,
        messages=_list(message, minItems=1),
        max_completion_tokens=_field("integer", minimum=1, maximum=LARGEST),
        logprobs=_field("boolean", default=False),
        top_logprobs=_field("integer", minimum=0, maximum=TOP, description="with logprobs only"),
        tools={"anyOf": [_list(tool, maxItems=MAX_TOOLS), {"type": "null"}]},
        tool_choice={"anyOf": [{"enum": [*CHOICES, None]}, named]},
        parallel_tool_calls=_field("boolean", default=True),
        response_format={
            "anyOf": [
                {"type": "null"},
                _object(["type"], type={"enum": ["text", "json_object"]}),
                _object(["type", "json_schema"], type={"const": "json_schema"}, json_schema=schema),
            ]
        },
        **_sampled("without it the answer may fill the context"),
    )


def _text(model: Schema) -> Schema:
    prompt = {"anyOf": [TEXT, TOKENS, _list({"anyOf": [TEXT, TOKENS]}, minItems=1, maxItems=MAX_ANSWERS)]}
    echo = _field("boolean", default=False, description="with max_tokens 0 the prompt alone is scored")
    logprobs = _field("integer", minimum=0, maximum=TOP)
    fields = _sampled("default 16")
    fields["max_tokens"] = fields["max_tokens"] | {"minimum": 0, "default": 16}
    return _object(["model", "prompt"], model=model, prompt=prompt, echo=echo, logprobs=logprobs, **fields)


def _responses(model: Schema) -> Schema:
    part = _object(["type", "text"], type={"enum": list(PARTS)}, text={"type": "string"})
    content = {"anyOf": [{"type": "string"}, _list(part)]}
    marks = {"id": _field("string"), "status": _field("string")}
    message = _object(
        ["role", "content"],
        type={"enum": ["message", None]},
        role={"enum": list(RESPONSE_ROLES)},
        content=content,
        **marks,
    )
    call = _object(
        ["type", "call_id", "name"],
        type={"const": "function_call"},
        call_id={"type": "string"},
        name=NAME,
        arguments=_field("string"),
        **marks,
    )
    output = _object(
        ["type", "call_id", "output"],
        type={"const": "function_call_output"},
        call_id={"type": "string", "description": "of an earlier call"},
        output=content,
        **marks,
    )
    function = {"const": "function"}
    tool = _object(["type", "name"], type=function, **_function())
    named = _object(["type", "name"], type=function, name=NAME)
    form = [
        {"type": "null"},
        _object(["type"], type={"enum": ["text", "json_object"]}),
        _object(["type", "name", "schema"], type={"const": "json_schema"}, **_json_schema()),
    ]
    return _object(
        ["model", "input"],
        model=model,
        input={"anyOf": [{"type": "string"}, _list({"anyOf": [message, call, output]}, minItems=1)]},
        text={"anyOf": [{"type": "null"}, _object([], format={"anyOf": form})]},
        tools={"anyOf": [_list(tool, maxItems=MAX_TOOLS), {"type": "null"}]},
        tool_choice={"anyOf": [{"enum": [*CHOICES, None]}, named]},
        parallel_tool_calls=_field("boolean", default=True),
        instructions=_field("string"),
        max_output_tokens=_field("integer", minimum=1, maximum=LARGEST),
        temperature=_field("number", minimum=0, maximum=2, default=1, description="0 is greedy"),
        top_p=_field("number", minimum=0, maximum=1, default=1),
        stream=_field("boolean", default=False),
        store={"enum": [False, None], "description": "nothing is stored"},
        user=_field("string", description="clients take turns by it"),
    )


def _vectors(model: Schema) -> Schema:
    many = _list({"anyOf": [TEXT, TOKENS]}, minItems=1, maxItems=MOST_INPUTS)
    return _object(
        ["model", "input"],
        model=model,
        input={"anyOf": [TEXT, TOKENS, many]},
        encoding_format={"enum": ["float", "base64", None]},
        dimensions=_field("integer", minimum=1, description="that of the model"),
        user=_field("string"),
    )


def document(served: Served) -> dict[str, Any]:
    """OpenAPI 3.1 of the server of this model."""
    model = {"const": served.name}
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
    tokens = {"type": "object", "required": ["tokens"], "properties": {"tokens": TOKENS}}
    content = {"type": "object", "required": ["content"], "properties": {"content": {"type": "string"}}}
    asked = _object(["content"], content={"type": "string"}, add_special=_field("boolean"))
    paths = {
        "/v1/models": {"get": operation("the one model")},
        "/v1/models/{name}": {"get": operation("the model of this name") | {"parameters": [name]}},
        "/v1/chat/completions": {"post": operation("answers to messages", of=_chat(model), stream=True)},
        "/v1/completions": {"post": operation("continuations of texts", of=_text(model), stream=True)},
        "/v1/responses": {"post": operation("an answer to messages", of=_responses(model), stream=True)},
        "/v1/embeddings": {"post": operation("vectors of texts", of=_vectors(model))},
        "/tokenize": {"post": operation("tokens of a text", of=asked, gives=tokens)},
        "/detokenize": {
            "post": operation("text of tokens", of=_object(["tokens"], tokens=TOKENS), gives=content)
        },
        "/health": {
            "get": operation("whether the model is loaded", gives={"type": "object", "required": ["status"]})
        },
        "/slots": {"get": operation("what each slot does", gives=_list({"type": "object"}))},
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "bitnet-jax serve", "version": "1"},
        "components": {"securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
        "security": [{}, {"key": []}],
        "paths": paths,
    }
