"""JSON schemas of the bodies that the server accepts, for its OpenAPI document.

They say what a field may be, and which fields there are; not what depends on other fields, such as `top_logprobs`
without `logprobs`, nor what depends on counting tokens.
"""

from __future__ import annotations

from typing import Any

from bitnet_jax.serving import responses, schemas
from bitnet_jax.serving.embeddings import MOST_INPUTS
from bitnet_jax.serving.messages import ROLES
from bitnet_jax.serving.passes import TOP
from bitnet_jax.serving.response_format import VERBOSITY
from bitnet_jax.serving.response_items import PARTS
from bitnet_jax.serving.response_items import ROLES as RESPONSE_ROLES
from bitnet_jax.serving.schemas import MAX_ANSWERS, MAX_BIASES, MAX_STOP_LENGTH, MAX_STOPS, Served
from bitnet_jax.serving.tools import CHOICES, MAX_TOOLS

Schema = dict[str, Any]


def fields(required: list[str], **properties: Schema) -> Schema:
    """An object as `Fields` reads it: null counts as absent, also of a field that is unknown."""
    shown = {name: schema if name in required else _or_null(schema) for name, schema in properties.items()}
    unknown = {"type": "null"}
    return {"type": "object", "properties": shown, "required": required, "additionalProperties": unknown}


def _or_null(schema: Schema) -> Schema:
    if "enum" in schema:
        return schema | {"enum": [*schema["enum"], None]}
    if "anyOf" in schema:
        return schema | {"anyOf": [*schema["anyOf"], {"type": "null"}]}
    return schema | {"type": [schema["type"], "null"]} if schema.get("type") else schema


def list_of(of: Schema, **more: Any) -> Schema:
    return {"type": "array", "items": of, **more}


def tokens(served: Served, least: int = 0) -> Schema:
    return list_of({"type": "integer", "minimum": 0, "maximum": served.vocab_size - 1}, minItems=least)


def _one_of(*values: Any, **more: Any) -> Schema:
    return {"enum": list(values), **more}


def _neutral(values: dict[str, tuple[Any, ...]]) -> dict[str, Schema]:
    """Fields that may only ask for nothing."""
    return {name: _one_of(*allowed, description="asks for nothing") for name, allowed in values.items()}


ANY_TEXT: Schema = {"type": "string"}
TEXT: Schema = {"type": "string", "minLength": 1}
NAME: Schema = {"type": "string", "pattern": "^[A-Za-z0-9_-]{1,64}$"}
FLAG: Schema = {"type": "boolean"}
COUNT: Schema = {"type": "integer", "minimum": 1, "maximum": 2**31 - 1}
FUNCTION = _one_of("function")
NUCLEUS: dict[str, Schema] = {
    "temperature": {"type": "number", "minimum": 0, "maximum": 2, "default": 1, "description": "0 is greedy"},
    "top_p": {"type": "number", "minimum": 0, "maximum": 1, "default": 1},
}
USER: Schema = {"type": "string", "description": "clients take turns by it"}
PARALLEL: Schema = {"type": "boolean", "default": True}
TOP_LOGPROBS: Schema = {"type": "integer", "minimum": 0, "maximum": TOP}


def _model(served: Served) -> Schema:
    return _one_of(*served.names)


def _sampled(most: str) -> dict[str, Schema]:
    """The fields that both kinds of completion have."""
    stop = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_LENGTH}
    penalty = {"type": "number", "minimum": -2, "maximum": 2, "default": 0}
    return {
        **NUCLEUS,
        "max_tokens": COUNT | {"description": most},
        "stop": {"anyOf": [stop, list_of(stop, maxItems=MAX_STOPS)]},
        "seed": {"type": "integer", "minimum": -(2**63), "maximum": 2**64 - 1},
        "n": {"type": "integer", "minimum": 1, "maximum": MAX_ANSWERS, "default": 1},
        "stream": FLAG | {"default": False},
        "stream_options": fields([], include_usage=FLAG) | {"description": "in a stream only"},
        "logit_bias": {
            "type": "object",
            "maxProperties": MAX_BIASES,
            "propertyNames": {"pattern": "^[0-9]{1,9}$"},
            "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
        },
        "presence_penalty": penalty,
        "frequency_penalty": penalty,
        "user": USER,
    }


def _called() -> dict[str, Schema]:
    """The fields of a function that may be called."""
    parameters = {"type": "object", "properties": {"type": _one_of("object")}, "description": "a JSON schema"}
    return {"name": NAME, "description": ANY_TEXT, "parameters": parameters, "strict": FLAG}


def _choice(named: Schema) -> Schema:
    return {"anyOf": [_one_of(*CHOICES), named]}


def _forms(required: list[str], **json_schema: Schema) -> Schema:
    """Formats of an answer; the arguments are the fields of one of type json_schema."""
    schema = fields(["type", *required], type=_one_of("json_schema"), **json_schema)
    return {"anyOf": [fields(["type"], type=_one_of("text", "json_object")), schema]}


def _json_schema() -> dict[str, Schema]:
    return {"name": NAME, "description": ANY_TEXT, "schema": {"type": "object"}, "strict": FLAG}


def _messages() -> Schema:
    part = fields(["type", "text"], type=_one_of("text"), text=ANY_TEXT)
    content = {"anyOf": [ANY_TEXT, list_of(part)]}
    function = fields(["name"], name=NAME, arguments=ANY_TEXT | {"description": "an object as JSON"})
    call = fields(["id", "function"], id=ANY_TEXT, type=FUNCTION, function=function, index={})
    said = [role for role in ROLES if role not in ("assistant", "tool")]
    assistant = _one_of("assistant")
    kinds = [
        fields(["role", "content"], role=_one_of(*said), content=content),
        fields(["role", "content"], role=assistant, content=content, tool_calls=list_of(call)),
        fields(
            ["role", "tool_calls"],
            role=assistant,
            content=content,
            tool_calls=list_of(call, minItems=1),
        ),
        fields(
            ["role", "content", "tool_call_id"],
            role=_one_of("tool"),
            content=content,
            tool_call_id=ANY_TEXT | {"description": "of an earlier call"},
        ),
    ]
    return list_of({"anyOf": kinds}, minItems=1)


def chat(served: Served) -> Schema:
    tool = fields(["type", "function"], type=FUNCTION, function=fields(["name"], **_called()))
    named = fields(["type", "function"], type=FUNCTION, function=fields(["name"], name=NAME))
    schema = fields(["name", "schema"], **_json_schema())
    return fields(
        ["model", "messages"],
        model=_model(served),
        messages=_messages(),
        max_completion_tokens=COUNT,
        logprobs=FLAG | {"default": False},
        top_logprobs=TOP_LOGPROBS | {"description": "with logprobs only"},
        tools=list_of(tool, maxItems=MAX_TOOLS),
        tool_choice=_choice(named),
        parallel_tool_calls=PARALLEL,
        response_format=_forms(["json_schema"], json_schema=schema),
        **_neutral(schemas.NEUTRAL),
        **_sampled("without it the answer may fill the context"),
    )


def text(served: Served) -> Schema:
    # A text without tokens cannot be continued.
    alone = ANY_TEXT if served.conversation.begin else TEXT
    one = [alone, tokens(served, least=1)]
    sampled = _sampled("default 16")
    sampled["max_tokens"] = sampled["max_tokens"] | {"minimum": 0, "default": 16}
    return fields(
        ["model", "prompt"],
        model=_model(served),
        prompt={"anyOf": [*one, list_of({"anyOf": one}, minItems=1, maxItems=MAX_ANSWERS)]},
        echo=FLAG | {"default": False, "description": "with max_tokens 0 the prompt alone is scored"},
        logprobs=TOP_LOGPROBS,
        **_neutral(schemas.NEUTRAL_OF_TEXT),
        **sampled,
    )


def response(served: Served) -> Schema:
    part = fields(
        ["type", "text"], type=_one_of(*PARTS), text=ANY_TEXT, annotations=_one_of([]), logprobs=_one_of([])
    )
    content = {"anyOf": [ANY_TEXT, list_of(part)]}
    marks = {"id": ANY_TEXT, "status": ANY_TEXT}
    call_id = ANY_TEXT
    message = fields(
        ["role", "content"], type=_one_of("message"), role=_one_of(*RESPONSE_ROLES), content=content, **marks
    )
    call = fields(
        ["type", "call_id", "name"],
        type=_one_of("function_call"),
        call_id=call_id,
        name=NAME,
        arguments=ANY_TEXT | {"description": "an object as JSON"},
        **marks,
    )
    result = fields(
        ["type", "call_id", "output"],
        type=_one_of("function_call_output"),
        call_id=call_id | {"description": "of an earlier call"},
        output=content,
        **marks,
    )
    items = list_of({"anyOf": [message, call, result]}, minItems=1)
    return fields(
        ["model", "input"],
        model=_model(served),
        input={"anyOf": [ANY_TEXT, items]},
        instructions=ANY_TEXT,
        max_output_tokens=COUNT,
        **NUCLEUS,
        stream=FLAG | {"default": False},
        text=fields([], format=_forms(["name", "schema"], **_json_schema()), verbosity=_one_of(*VERBOSITY)),
        tools=list_of(fields(["type", "name"], type=FUNCTION, **_called()), maxItems=MAX_TOOLS),
        tool_choice=_choice(fields(["type", "name"], type=FUNCTION, name=NAME)),
        parallel_tool_calls=PARALLEL,
        user=USER,
        **_neutral(responses.NEUTRAL),
    )


def vectors(served: Served) -> Schema:
    one = tokens(served, least=1)
    many = {"minItems": 1, "maxItems": MOST_INPUTS}
    return fields(
        ["model", "input"],
        model=_model(served),
        input={"anyOf": [TEXT, one, list_of(TEXT, **many), list_of(one, **many)]},
        encoding_format=_one_of("float", "base64"),
        dimensions=COUNT | {"description": "that of the model"},
        user=ANY_TEXT,
    )


def tokenize() -> Schema:
    return fields(["content"], content=ANY_TEXT, add_special=FLAG)


def detokenize(served: Served) -> Schema:
    return fields(["tokens"], tokens=tokens(served))
