"""The Responses API: its bodies as those of chat, and the answers of chat as its objects and typed events.

Form of objects and events: OpenAI's, with texts and functions as the only kinds of input and output.
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
from bitnet_jax.serving.response_format import text_format
from bitnet_jax.serving.response_items import input_messages
from bitnet_jax.serving.response_output import Output
from bitnet_jax.serving.schemas import Asked, Served, chat
from bitnet_jax.serving.streams import PING, Running, data
from bitnet_jax.serving.tools import tools

# Fields that ask for what this server cannot do, and the values that do not.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "background": (False,),
    "include": ([],),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "stream_options": ({}, {"include_obfuscation": False}),
    "top_logprobs": (0,),
    "truncation": ("disabled",),
}


@dataclasses.dataclass(frozen=True)
class AskedResponse(Asked):
    """A chat with the fields of the body that its answer repeats."""

    given: dict[str, Any] = dataclasses.field(kw_only=True)


def response(fields: Fields, served: Served, client: str) -> AskedResponse:
    """Raises ApiError, or DataError of the chat template."""
    adapter = served.adapter(fields)
    instructions = fields.text("instructions")
    history = [] if instructions is None else [{"role": "system", "content": instructions}]
    history += input_messages(fields)
    most = fields.integer("max_output_tokens", 1, 2**31 - 1)
    given = {
        "instructions": instructions,
        "max_output_tokens": most,
        "temperature": fields.number("temperature", 0, 2, 1.0),
        "top_p": fields.number("top_p", 0, 1, 1.0),
        "user": fields.text("user"),
    }
    repeated = {
        "parallel_tool_calls": fields.look("parallel_tool_calls", True),
        "text": fields.look("text", {}),
        "tool_choice": fields.look("tool_choice", "auto"),
        "tools": fields.look("tools", []),
    }
    functions, lark = tools(fields, flat=True), text_format(fields)
    others = {
        "max_completion_tokens": most,
        "stream": fields.boolean("stream"),
        **{name: given[name] for name in ("temperature", "top_p", "user")},
    }
    for name, neutral in NEUTRAL.items():
        fields.only(name, neutral)
    fields.done()
    asked = chat(Fields(others), served, client, adapter, history, functions, lark, "text.format")
    repeated["text"] = {"format": repeated["text"].get("format") or {"type": "text"}}
    repeated["tools"] = [tool | {"strict": tool.get("strict") is not False} for tool in repeated["tools"]]
    return AskedResponse(**vars(asked), given=given | repeated)


class ResponseEnvelope:
    """The object of a response, at every time of its life, and its events."""

    def __init__(self, asked: Asked, served: Served) -> None:
        assert isinstance(asked, AskedResponse)
        self._usage = Envelope(asked, served).usage
        self._key = secrets.token_hex(12)
        self._fixed = {
            "id": f"resp_{self._key}",
            "object": "response",
            "created_at": int(time.time()),
            "model": asked.model(served),
            **asked.given,
            "metadata": {},
            "previous_response_id": None,
            "store": False,
            "truncation": "disabled",
        }

    def whole(self, choices: list[Choice]) -> dict[str, Any]:
        """The response once its one choice is finished."""
        output = Output(self._key)
        for delta in choices[0].news:
            output.take(delta)
        output.finish(self._status(choices))
        return self._ended(choices, output)

    async def events(self, running: Running) -> AsyncIterator[str]:
        """Lines of the stream; the last event is one of completed, incomplete and failed, and no [DONE] follows."""
        numbers = itertools.count()

        def event(kind: str, fields: dict[str, Any]) -> str:
            name = f"response.{kind}"
            return f"event: {name}\n" + data({"type": name, "sequence_number": next(numbers), **fields})

        started = {"response": self._response("in_progress")}
        yield event("created", started)
        yield event("in_progress", started)
        output = Output(self._key)
        try:
            async for chunk in running.chunks():
                if chunk is None:
                    yield PING
                    continue
                for kind, fields in output.take(chunk["delta"]):
                    yield event(kind, fields)
        except ApiError as error:  # the status has been sent
            failure = {"code": error.body["error"]["code"], "message": str(error)}
            yield event("failed", {"response": self._response("failed", error=failure)})
            return
        status = self._status(running.choices)
        for kind, fields in output.finish(status):
            yield event(kind, fields)
        yield event(status, {"response": self._ended(running.choices, output)})

    def _status(self, choices: list[Choice]) -> str:
        end = choices[0].finished
        assert end is not None
        return "incomplete" if end.reason == "length" else "completed"

    def _ended(self, choices: list[Choice], output: Output) -> dict[str, Any]:
        status, used = self._status(choices), self._usage(choices)
        usage = {
            "input_tokens": used["prompt_tokens"],
            "input_tokens_details": used["prompt_tokens_details"],
            "output_tokens": used["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": used["total_tokens"],
        }
        details = {"reason": "max_output_tokens"} if status == "incomplete" else None
        return self._response(status, output=output.items, incomplete_details=details, usage=usage)

    def _response(self, status: str, **fields: Any) -> dict[str, Any]:
        empty: dict[str, Any] = {"error": None, "incomplete_details": None, "output": [], "usage": None}
        return {**self._fixed, "status": status, **empty, **fields}
