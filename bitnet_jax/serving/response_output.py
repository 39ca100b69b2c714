"""The output of a response while it comes: items, which are texts and calls of functions, and their events."""

from __future__ import annotations

from typing import Any

Events = list[tuple[str, dict[str, Any]]]  # (type without "response.", fields)


class Output:
    """Takes the deltas of a chat, and returns the events of each. Only the last item is open, and it alone grows.

    Args:
      key: of the ids of the items.
    """

    def __init__(self, key: str) -> None:
        self.items: list[dict[str, Any]] = []  # those that are complete
        self._key = key
        self._head: dict[
            str, Any
        ] = {}  # the fields of the open item that are known from the start; {}: none is open
        self._written: list[str] = []  # its text or arguments

    def take(self, delta: dict[str, Any]) -> Events:
        events: Events = []
        for name, value in delta.items():  # in the order in which the model wrote them
            if name == "content" and value:
                events += self._write_text(value)
            for call in value if name == "tool_calls" else ():
                events += self._write_call(call)
        return events

    def finish(self, status: str) -> Events:
        """The status is that of the last item. Of an answer without any, it is an empty text."""
        begun = [] if self._head or self.items else self._begin_text()
        return begun + self._end(status)

    def _write_text(self, text: str) -> Events:
        begun = [] if self._head.get("type") == "message" else self._begin_text()
        self._written.append(text)
        return [*begun, ("output_text.delta", {**self._place, "delta": text, "logprobs": []})]

    def _write_call(self, call: dict[str, Any]) -> Events:
        events: Events = []
        function = call["function"]
        if "id" in call:  # the first of its deltas
            head = {"type": "function_call", "call_id": call["id"], "name": function["name"]}
            events += self._begin("fc", head)
        if arguments := function["arguments"]:
            self._written.append(arguments)
            events.append(("function_call_arguments.delta", {**self._place, "delta": arguments}))
        return events

    def _begin_text(self) -> Events:
        events = self._begin("msg", {"type": "message", "role": "assistant"})
        return [*events, ("content_part.added", {**self._place, "part": _text("")})]

    def _begin(self, prefix: str, head: dict[str, Any]) -> Events:
        events = self._end("completed")
        self._head = {"id": f"{prefix}_{self._key}{len(self.items)}"} | head
        empty: dict[str, Any] = {"content": []} if prefix == "msg" else {"arguments": ""}
        item = {**self._head, "status": "in_progress", **empty}
        return [*events, ("output_item.added", {"output_index": len(self.items), "item": item})]

    def _end(self, status: str) -> Events:
        if not self._head:
            return []
        place, text = self._place, "".join(self._written)
        if self._head["type"] == "message":
            item = {**self._head, "status": status, "content": [_text(text)]}
            events: Events = [
                ("output_text.done", {**place, "text": text, "logprobs": []}),
                ("content_part.done", {**place, "part": _text(text)}),
            ]
        else:
            item = {**self._head, "status": status, "arguments": text}
            events = [
                ("function_call_arguments.done", {**place, "name": self._head["name"], "arguments": text})
            ]
        events.append(("output_item.done", {"output_index": len(self.items), "item": item}))
        self.items.append(item)
        self._head, self._written = {}, []
        return events

    @property
    def _place(self) -> dict[str, Any]:
        place: dict[str, Any] = {"item_id": self._head["id"], "output_index": len(self.items)}
        return place | {"content_index": 0} if self._head["type"] == "message" else place


def _text(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
