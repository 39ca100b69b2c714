"""The field `input` of the Responses API as messages of a chat.

What the model said in one turn is one message of a chat, and here several items: messages and calls of functions.
"""

from __future__ import annotations

from typing import Any

from bitnet_jax.serving import messages as chat
from bitnet_jax.serving.fields import ApiError, Fields

ROLES = ("system", "developer", "user", "assistant")
PARTS = ("input_text", "output_text")
KINDS = ("message", "function_call", "function_call_output")


def input_messages(fields: Fields) -> list[dict[str, Any]]:
    """Raises ApiError."""
    given = fields.take("input")
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    if not isinstance(given, list) or not given:
        raise fields.wrong("input", given, "a text or a list of messages")
    read: list[dict[str, Any]] = []
    asked: set[str] = set()
    for i, item in enumerate(given):
        message = _item(item, f"input[{i}].", asked)
        if read and _same_turn(read[-1], message):
            calls = [*read[-1].get("tool_calls", ()), *message.get("tool_calls", ())]
            read[-1] |= {"content": read[-1]["content"] + message["content"], "tool_calls": calls}
        else:
            read.append(message)
    return read


def _same_turn(last: dict[str, Any], message: dict[str, Any]) -> bool:
    assistants = last["role"] == message["role"] == "assistant"
    return assistants and ("tool_calls" in last or "tool_calls" in message)


def _item(item: Any, where: str, asked: set[str]) -> dict[str, Any]:
    """Of a client, or of an earlier response's output; `asked` are the calls so far, to which one may be added."""
    if not isinstance(item, dict):
        raise ApiError(f"{where[:-1]}: expected an object with role and content", param="input")
    fields = Fields(item, where)
    kind = fields.text("type", "message")
    if kind not in KINDS:
        raise fields.wrong("type", kind, f"one of {', '.join(KINDS)}")
    fields.text("id")
    fields.text("status")
    if kind == "message":
        role = fields.text("role")
        if role not in ROLES:
            raise fields.wrong("role", role, f"one of {', '.join(ROLES)}")
        message = {"role": chat.ROLES[role], "content": _content(fields, "content", where)}
        fields.done()
        return message
    identity = fields.text("call_id")
    if identity is None:
        raise fields.wrong("call_id", None, "that of a call")
    if kind == "function_call":
        asked.add(identity)
        return {"role": "assistant", "content": "", "tool_calls": [chat.call_of(fields, identity)]}
    if identity not in asked:
        raise fields.wrong("call_id", identity, "that of an earlier function_call")
    message = {"role": "tool", "content": _content(fields, "output", where), "tool_call_id": identity}
    fields.done()
    return message


def _content(fields: Fields, name: str, where: str) -> str:
    content = fields.take(name)
    if isinstance(content, list):
        content = "".join(_part(part, f"{where}{name}[{i}].") for i, part in enumerate(content))
    if not isinstance(content, str):
        raise fields.wrong(name, content, "a text, or a list of text parts")
    return content


def _part(part: Any, where: str) -> str:
    fields = Fields(part if isinstance(part, dict) else {}, where)
    kind, text = fields.text("type"), fields.text("text")
    if kind not in PARTS or text is None:
        raise fields.wrong("type", kind, f"a part of type {' or '.join(PARTS)} with a text")
    fields.only("annotations", ([],))
    fields.only("logprobs", ([],))
    fields.done()
    return text
