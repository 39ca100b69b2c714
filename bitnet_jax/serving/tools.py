"""Tools of a chat: the functions that a model may call, and the grammar of its calls.

A call is written as models of the Hermes and Qwen families write it:

    <tool_call>
    {"name": "search", "arguments": {"query": "ternary"}}
    </tool_call>
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from bitnet_jax.data.errors import DataError
from bitnet_jax.serving.fields import ApiError, Fields
from bitnet_jax.serving.grammar import json_value

OPEN, CLOSE = "<tool_call>", "</tool_call>"
MAX_TOOLS, MAX_CALLS = 64, 16  # the latter of an answer that must call
CHOICES = ("none", "auto", "required")


@dataclasses.dataclass(frozen=True)
class Tools:
    definitions: tuple[dict[str, Any], ...]  # for the chat template
    names: tuple[str, ...]  # of the functions
    lark: str | None  # the grammar of the answer; None: any text, in which calls are recognised


def tools(fields: Fields, *, flat: bool = False) -> Tools | None:
    """The fields `tools`, `tool_choice` and `parallel_tool_calls`; None: nothing can be called.

    Args:
      flat: the form of the Responses API, where name and parameters stand beside the type, and calls keep to the
        parameters unless `strict` is false.

    Raises:
      ApiError: not in this form, or too large.
    """
    given = fields.take("tools", [])
    choice, parallel = fields.take("tool_choice", "auto"), fields.boolean("parallel_tool_calls", True)
    if not isinstance(given, list) or len(given) > MAX_TOOLS:
        raise fields.wrong("tools", given, f"a list of at most {MAX_TOOLS} functions")
    functions = [_function(tool, f"tools[{i}].", flat) for i, tool in enumerate(given)]
    schemas = {name: schema for name, schema, _ in functions}
    if len(schemas) < len(functions):
        raise ApiError("tools: got two functions with one name, expected different names", param="tools")
    if isinstance(choice, dict):
        called = [_named(choice, flat)]
    elif choice in CHOICES:
        called = list(schemas)
    else:
        raise fields.wrong("tool_choice", choice, f"{', '.join(CHOICES)} or a function")
    if not functions and choice not in ("none", "auto"):
        raise ApiError("tool_choice: got a call without tools, expected the field tools", param="tool_choice")
    if unknown := [name for name in called if name not in schemas]:
        raise fields.wrong("tool_choice", unknown[0], f"one of {', '.join(schemas)[:200]}")
    if not functions or choice == "none":
        return None
    if choice != "auto":
        more = f' ("\\n" call){{0,{MAX_CALLS - 1}}}' if parallel and not isinstance(choice, dict) else ""
        lark = f'start: call{more}\ncall: "{OPEN}" rest_of_call\n'
    elif not parallel or any(strict for _, _, strict in functions):
        some = "*" if parallel else "?"
        lark = (
            f"start: (up_to_call rest_of_call){some} TEXT\n"
            f"up_to_call[lazy]: /(\\n|.)*{OPEN}/\n"
            f"TEXT: /(\\n|.)*/ & ~/(\\n|.)*{OPEN}(\\n|.)*/\n"
        )
    else:
        lark = None
    if lark is not None:
        lark += _calls({name: schemas[name] for name in called})
    definitions = [_nested(tool) for tool in given] if flat else given
    return Tools(tuple(definitions), tuple(schemas), lark)


def _nested(tool: dict[str, Any]) -> dict[str, Any]:
    """A tool of the Responses API in the form of a chat."""
    return {"type": "function", "function": {name: tool[name] for name in tool if name != "type"}}


def _calls(schemas: dict[str, dict[str, Any]]) -> str:
    """What follows OPEN in a call."""
    rules = [f'rest_of_call: "\\n" ({" | ".join(f"call_{i}" for i in range(len(schemas)))}) "\\n{CLOSE}"']
    for i, (name, schema) in enumerate(schemas.items()):
        head = json.dumps(f'{{"name": "{name}", "arguments": ')
        try:
            rules += [f'call_{i}: {head} arguments_{i} "}}"', f"arguments_{i}: {json_value(schema)}"]
        except DataError as error:
            raise ApiError(f"tools: {name}: {error}", param="tools") from error
    return "\n".join(rules) + "\n"


def _function(tool: Any, where: str, flat: bool) -> tuple[str, dict[str, Any], bool]:
    """Name, schema of the arguments, and whether calls must keep to it."""
    fields = _described(tool, where, flat)
    name, strict = fields.identifier("name"), fields.boolean("strict", flat)
    fields.text("description")
    schema = fields.take("parameters", {"type": "object", "properties": {}, "additionalProperties": False})
    if not isinstance(schema, dict) or schema.get("type", "object") != "object":
        raise fields.wrong("parameters", schema, "a schema of type object")
    fields.done()
    return name, {"type": "object"} | schema, strict


def _named(choice: dict[str, Any], flat: bool) -> str:
    fields = _described(choice, "tool_choice.", flat)
    name = fields.identifier("name")
    fields.done()
    return name


def _described(value: Any, where: str, flat: bool) -> Fields:
    """The fields of a function."""
    outer = Fields(value if isinstance(value, dict) else {}, where)
    if (kind := outer.text("type")) != "function":
        raise outer.wrong("type", kind, "function, the only type supported")
    if flat:
        return outer
    function = outer.take("function")
    if not isinstance(function, dict):
        raise outer.wrong("function", function, 'an object such as {"name": "search"}')
    outer.done()
    return Fields(function, f"{where}function.")
