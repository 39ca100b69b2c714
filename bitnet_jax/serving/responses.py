"""The Responses API: its bodies as those of chat, and the answers of chat as its objects and typed events.

Form of objects and events: OpenAI's, with text as the only kind of input and output.
"""

from __future__ import annotations

import dataclasses
import itertools
import secrets
import time
from collections.abc import AsyncIterator
from typing import Any

from bitnet_jax.serving.fields import ApiError, Fields
from bitnet_jax.serving.objects import Choice, Envelope
from bitnet_jax.serving.schemas import Asked, Served, chat_completion
from bitnet_jax.serving.streams import PING, Running, data

ROLES = ("system", "developer", "user", "assistant")
PARTS = ("input_text", "output_text")
# Fields that ask for what this server cannot do, and the values that do not.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "background": (False,),
    "include": ([],),
    "parallel_tool_calls": (True,),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "stream_options": ({}, {"include_obfuscation": False}),
    "text": ({}, {"format": {"type": "text"}}),
    "tool_choice": ("auto",),
    "tools": ([],),
    "top_logprobs": (0,),
    "truncation": ("disabled",),
}


@dataclasses.dataclass(frozen=True)
class AskedResponse(Asked):
    """A chat with the fields of the body that its answer repeats."""

    given: dict[str, Any] = dataclasses.field(kw_only=True)


def response(fields: Fields, served: Served, client: str) -> AskedResponse:
    """Raises ApiError, or DataError of the chat template."""
    instructions = fields.text("instructions")
    messages = [] if instructions is None else [{"role": "system", "content": instructions}]
    most = fields.integer("max_output_tokens", 1, 2**31 - 1)
    given = {
        "instructions": instructions,
        "max_output_tokens": most,
        "temperature": fields.number("temperature", 0, 2, 1.0),
        "top_p": fields.number("top_p", 0, 1, 1.0),
        "user": fields.text("user"),
    }
    chat = {
        "model": fields.text("model"),
        "messages": messages + _messages(fields),
        "max_completion_tokens": most,
        "stream": fields.boolean("stream"),
        **{name: given[name] for name in ("temperature", "top_p", "user")},
    }
    for name, neutral in NEUTRAL.items():
        fields.only(name, neutral)
    fields.done()
    return AskedResponse(**vars(chat_completion(Fields(chat), served, client)), given=given)


def _messages(fields: Fields) -> list[dict[str, str]]:
    given = fields.take("input")
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    if not isinstance(given, list) or not given:
        raise fields.wrong("input", given, "a text or a list of messages")
    return [_message(item, f"input[{i}].") for i, item in enumerate(given)]


def _message(item: Any, where: str) -> dict[str, str]:
    """Of a message as clients write it, or an item of an earlier response's output."""
    if not isinstance(item, dict):
        raise ApiError(f"{where[:-1]}: expected an object with role and content", param="input")
    fields = Fields(item, where)
    kind, role, content = fields.text("type", "message"), fields.text("role"), fields.take("content")
    if kind != "message":
        raise fields.wrong("type", kind, "message, the only kind of item supported")
    if role not in ROLES:
        raise fields.wrong("role", role, f"one of {', '.join(ROLES)}")
    if isinstance(content, list):
        content = "".join(_part(part, f"{where}content[{i}].") for i, part in enumerate(content))
    if not isinstance(content, str):
        raise fields.wrong("content", content, "a text, or a list of text parts")
    fields.text("id")
    fields.text("status")
    fields.done()
    return {"role": role, "content": content}


def _part(part: Any, where: str) -> str:
    fields = Fields(part if isinstance(part, dict) else {}, where)
    kind, text = fields.text("type"), fields.text("text")
    if kind not in PARTS or text is None:
        raise fields.wrong("type", kind, f"a part of type {' or '.join(PARTS)} with a text")
    fields.only("annotations", ([],))
    fields.only("logprobs", ([],))
    fields.done()
    return text


class ResponseEnvelope:
    """The object of a response, at every time of its life, and its events."""

    def __init__(self, asked: Asked, served: Served) -> None:
        assert isinstance(asked, AskedResponse)
        self._usage = Envelope(asked, served).usage
        self._item = f"msg_{secrets.token_hex(12)}"
        self._fixed = {
            "id": f"resp_{secrets.token_hex(12)}",
            "object": "response",
            "created_at": int(time.time()),
            "model": served.name,
            **asked.given,
            "metadata": {},
            "parallel_tool_calls": True,
            "previous_response_id": None,
            "store": False,
            "text": {"format": {"type": "text"}},
            "tool_choice": "auto",
            "tools": [],
            "truncation": "disabled",
        }

    def whole(self, choices: list[Choice]) -> dict[str, Any]:
        """The response once its one choice is finished."""
        answer = choices[0].whole()
        cut = answer["finish_reason"] == "length"
        used = self._usage(choices)
        status = "incomplete" if cut else "completed"
        usage = {
            "input_tokens": used["prompt_tokens"],
            "input_tokens_details": used["prompt_tokens_details"],
            "output_tokens": used["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": used["total_tokens"],
        }
        output = [self._message(status, [_text(answer["message"]["content"])])]
        details = {"reason": "max_output_tokens"} if cut else None
        return self._response(status, output=output, incomplete_details=details, usage=usage)

    async def events(self, running: Running) -> AsyncIterator[str]:
        """Lines of the stream; the last event is one of completed, incomplete and failed, and no [DONE] follows."""
        numbers = itertools.count()

        def event(kind: str, **fields: Any) -> str:
            name = f"response.{kind}"
            return f"event: {name}\n" + data({"type": name, "sequence_number": next(numbers), **fields})

        started = self._response("in_progress")
        place: dict[str, Any] = {"item_id": self._item, "output_index": 0, "content_index": 0}
        yield event("created", response=started)
        yield event("in_progress", response=started)
        yield event("output_item.added", output_index=0, item=self._message("in_progress", []))
        yield event("content_part.added", **place, part=_text(""))
        try:
            async for chunk in running.chunks():
                if chunk is None:
                    yield PING
                elif text := chunk["delta"].get("content"):
                    yield event("output_text.delta", **place, delta=text, logprobs=[])
        except ApiError as error:  # the status has been sent
            failure = {"code": "server_error", "message": str(error)}
            yield event("failed", response=self._response("failed", error=failure))
            return
        ended = self.whole(running.choices)
        (item,) = ended["output"]
        (part,) = item["content"]
        yield event("output_text.done", **place, text=part["text"], logprobs=[])
        yield event("content_part.done", **place, part=part)
        yield event("output_item.done", output_index=0, item=item)
        yield event(ended["status"], response=ended)

    def _response(self, status: str, **fields: Any) -> dict[str, Any]:
        empty: dict[str, Any] = {"error": None, "incomplete_details": None, "output": [], "usage": None}
        return {**self._fixed, "status": status, **empty, **fields}

    def _message(self, status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
        head = {"id": self._item, "type": "message", "role": "assistant"}
        return {**head, "status": status, "content": content}


def _text(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
