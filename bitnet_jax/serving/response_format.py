"""Answers that are JSON, of a schema or any object: `response_format` of a chat, `text.format` of a response."""

from __future__ import annotations

from typing import Any

from bitnet_jax.data.errors import DataError
from bitnet_jax.serving.fields import ApiError, Fields
from bitnet_jax.serving.grammar import json_answer

VERBOSITY = ("medium",)  # a model is not told of others


def response_format(fields: Fields) -> str | None:
    """The grammar that the field of a chat asks for; None: the answer is any text. Raises ApiError."""
    return _grammar(fields, "response_format", "response_format", flat=False)


def text_format(fields: Fields) -> str | None:
    """The same of the field `text` of the Responses API, where the schema stands beside the type. Raises ApiError."""
    text = fields.take("text", {})
    if not isinstance(text, dict):
        raise fields.wrong("text", text, "an object with format")
    inner = Fields(text, "text.")
    lark = _grammar(inner, "format", "text.format", flat=True)
    inner.only("verbosity", VERBOSITY)
    inner.done()
    return lark


def _grammar(fields: Fields, name: str, path: str, *, flat: bool) -> str | None:
    asked = fields.take(name, {"type": "text"})
    if not isinstance(asked, dict):
        raise fields.wrong(name, asked, "an object")
    asked = Fields(asked, f"{path}.")
    kind = asked.text("type")
    if kind == "json_schema":
        schema = _schema(asked if flat else _nested(asked, f"{path}.json_schema."))
    elif kind in ("text", "json_object"):
        schema = {"type": "object"}
    else:
        raise asked.wrong("type", kind, "text, json_object or json_schema")
    asked.done()
    if kind == "text":
        return None
    try:
        return json_answer(schema)
    except DataError as error:
        raise ApiError(f"{path}: {error}", param=path) from error


def _nested(asked: Fields, where: str) -> Fields:
    value = asked.take("json_schema")
    if not isinstance(value, dict):
        raise asked.wrong("json_schema", value, "an object with name and schema")
    return Fields(value, where)


def _schema(fields: Fields) -> dict[str, Any]:
    fields.identifier("name")
    fields.text("description")
    fields.boolean("strict")  # the schema is kept to either way
    schema = fields.take("schema")
    if not isinstance(schema, dict):
        raise fields.wrong("schema", schema, "an object")
    fields.done()
    return schema
