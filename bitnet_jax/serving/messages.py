"""The messages of a chat, as the chat template takes them: texts, calls of tools, and what the tools answered."""

from __future__ import annotations

import json
from typing import Any

from bitnet_jax.serving.fields import ApiError, Fields

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
}


def messages(fields: Fields) -> list[dict[str, Any]]:
    """The field `messages`. Raises ApiError."""
    given = fields.take("messages")
    if not isinstance(given, list) or not given:
        raise fields.wrong("messages", given, "a list of messages")
    read = [_message(message, f"messages[{i}].") for i, message in enumerate(given)]
    asked: set[str] = set()
    for i, message in enumerate(read):
        asked |= {call["id"] for call in message.get("tool_calls", ())}
        if message["role"] == "tool" and message["tool_call_id"] not in asked:
            raise ApiError(
                f"messages[{i}].tool_call_id: got {message['tool_call_id'][:60]!r}, expected that of an earlier call",
                param="messages",
            )
    return read


def mentions_calls(message: dict[str, Any]) -> bool:
    return message["role"] == "tool" or "tool_calls" in message


def _message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise ApiError(f"{where[:-1]}: expected an object with role and content", param="messages")
    fields = Fields(message, where)
    role, content = fields.text("role"), fields.take("content")
    if role not in ROLES:
        raise fields.wrong("role", role, f"one of {', '.join(ROLES)}")
    more: dict[str, Any] = {}
    if role == "assistant" and (calls := _calls(fields, where)):
        more, content = {"tool_calls": calls}, "" if content is None else content
    elif role == "tool":
        more = {"tool_call_id": fields.text("tool_call_id", "")}
    if isinstance(content, list):
        content = "".join(_part(part, f"{where}content[{i}].") for i, part in enumerate(content))
    if not isinstance(content, str):
        raise fields.wrong("content", content, "a text, or a list of text parts")
    fields.only("refusal", ())
    fields.done()
    return {"role": ROLES[role], "content": content, **more}


def _calls(fields: Fields, where: str) -> list[dict[str, Any]]:
    calls = fields.take("tool_calls", [])
    if not isinstance(calls, list):
        raise fields.wrong("tool_calls", calls, "a list of calls")
    return [_call(call, f"{where}tool_calls[{i}].") for i, call in enumerate(calls)]


def _call(call: Any, where: str) -> dict[str, Any]:
    """A call with its arguments as an object, which is what templates write."""
    fields = Fields(call if isinstance(call, dict) else {}, where)
    fields.take("index")  # some clients return the deltas of a stream
    identity, kind, function = fields.text("id"), fields.text("type", "function"), fields.take("function")
    if identity is None or kind != "function" or not isinstance(function, dict):
        raise ApiError(f"{where[:-1]}: expected an id, type function and function", param="messages")
    fields.done()
    return call_of(Fields(function, f"{where}function."), identity)


def call_of(fields: Fields, identity: str) -> dict[str, Any]:
    """The call in the fields `name` and `arguments`, and no others. Raises ApiError."""
    name, text = fields.identifier("name"), fields.text("arguments", "{}")
    fields.done()
    try:
        arguments = json.loads(text or "{}")
    except ValueError:
        arguments = None
    if not isinstance(arguments, dict):
        raise fields.wrong("arguments", text, "an object as JSON text")
    return {"id": identity, "type": "function", "function": {"name": name, "arguments": arguments}}


def _part(part: Any, where: str) -> str:
    fields = Fields(part if isinstance(part, dict) else {}, where)
    kind, text = fields.text("type"), fields.text("text")
    if kind != "text" or text is None:
        raise fields.wrong("type", kind, "a part of type text, the only one supported")
    fields.done()
    return text
