"""The field `response_format` of a chat: an answer that is a JSON value, of a schema or any object."""

from __future__ import annotations

from typing import Any

from bitnet_jax.data.errors import DataError
from bitnet_jax.serving.fields import ApiError, Fields
from bitnet_jax.serving.grammar import json_answer


def response_format(fields: Fields) -> str | None:
    """The grammar that it asks for; None: the answer is any text. Raises ApiError."""
    asked = fields.take("response_format", {"type": "text"})
    if not isinstance(asked, dict):
        raise fields.wrong("response_format", asked, "an object")
    asked = Fields(asked, "response_format.")
    kind = asked.text("type")
    if kind == "json_schema":
        schema = _schema(asked)
    elif kind in ("text", "json_object"):
        schema = {"type": "object"}
    else:
        raise asked.wrong("type", kind, "text, json_object or json_schema")
    asked.done()
    return None if kind == "text" else grammar_of(schema, "response_format")


def _schema(asked: Fields) -> dict[str, Any]:
    value = asked.take("json_schema")
    if not isinstance(value, dict):
        raise asked.wrong("json_schema", value, "an object with name and schema")
    inner = Fields(value, "response_format.json_schema.")
    inner.identifier("name")
    inner.text("description")
    inner.boolean("strict")  # the schema is kept to either way
    schema = inner.take("schema")
    if not isinstance(schema, dict):
        raise inner.wrong("schema", schema, "an object")
    inner.done()
    return schema


def grammar_of(schema: dict[str, Any], param: str) -> str:
    """`json_answer`, with its errors as ApiError."""
    try:
        return json_answer(schema)
    except DataError as error:
        raise ApiError(f"{param}: {error}", param=param) from error
