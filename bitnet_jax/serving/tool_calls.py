"""The calls of tools in the text of an answer, while it comes.

Text becomes content, and a call (see tools.py) an id and name once, then its arguments as the model writes them. What
looks like a call but names no known function, or is not in the form, is content.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection
from typing import Any

from bitnet_jax.serving.requests import Request
from bitnet_jax.serving.tools import CLOSE, OPEN

HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*"([^"\\]*)"\s*,\s*"arguments"\s*:\s*(?=\{)')


class ToolCalls:
    """`push` takes text and returns what is new as fields of a message of a stream: content, tool_calls, or neither."""

    def __init__(self, names: Collection[str], request: Request) -> None:
        self._names = names
        self._seed = hashlib.sha256(request.prompt.tobytes() + str(request.seed).encode())
        self.calls: list[dict[str, Any]] = []  # complete, as those of a message
        self._held = ""  # text that is not yet content nor arguments
        self._opening = ""  # what began the call that is being read
        self._state = self._text
        self._new: dict[str, Any] = {}

    def push(self, text: str) -> dict[str, Any]:
        self._new, self._held = {}, self._held + text
        while self._state():
            pass
        return self._new

    def finish(self) -> dict[str, Any]:
        """What was held back when the answer ends."""
        self._new = {}
        if self._state == self._head:
            self._content(self._opening + self._held)
        elif self._state == self._text and not (self.calls and self._held.isspace()):
            self._content(self._held)
        return self._new

    # States: each takes what it can from the held text, and says whether the next one may go on.

    def _text(self) -> bool:
        before, found, after = self._held.partition(OPEN)
        if found:  # space before a call is part of its form
            content = before.rstrip()
            self._content(content)
            self._opening = before[len(content) :] + OPEN
            self._held, self._state = after, self._head
            return True
        # What may begin a call is held back, with the space before it.
        begun = next((n for n in range(len(OPEN) - 1, 0, -1) if before.endswith(OPEN[:n])), 0)
        content = before[: len(before) - begun].rstrip()
        self._content(content)
        self._held = before[len(content) :]
        return False

    def _head(self) -> bool:
        head = HEAD.match(self._held)
        if head is not None and head[1] in self._names:
            index = len(self.calls)
            digest = self._seed.copy()
            digest.update(f" {index}".encode())
            function = {"name": head[1], "arguments": ""}
            self.calls.append(
                {"id": f"call_{digest.hexdigest()[:24]}", "type": "function", "function": function}
            )
            new = {"index": index, **self.calls[-1], "function": dict(function)}
            self._new.setdefault("tool_calls", []).append(new)
            self._held, self._state = self._held[head.end() :], self._arguments
            self._depth, self._quoted, self._escaped = 0, False, False
            return True
        if CLOSE in self._held:  # not a call
            self._content(self._opening + self._held[: self._held.index(CLOSE) + len(CLOSE)])
            self._held, self._state = self._held.partition(CLOSE)[2], self._text
            return True
        return False

    def _arguments(self) -> bool:
        """Up to the brace that closes the first one."""
        for i, letter in enumerate(self._held):
            if self._quoted:
                self._quoted = letter != '"' or self._escaped
                self._escaped = letter == "\\" and not self._escaped
            elif letter == '"':
                self._quoted = True
            elif letter in "{[":
                self._depth += 1
            elif letter in "}]":
                self._depth -= 1
            if not self._depth:
                self._write(self._held[: i + 1])
                self._held, self._state = self._held[i + 1 :], self._end
                return True
        self._write(self._held)
        self._held = ""
        return False

    def _end(self) -> bool:
        _, found, after = self._held.partition(CLOSE)
        if found:
            self._held, self._state = after, self._text
        return bool(found)

    def _content(self, text: str) -> None:
        if text:
            self._new["content"] = self._new.get("content", "") + text

    def _write(self, arguments: str) -> None:
        if not arguments:
            return
        index = len(self.calls) - 1
        self.calls[-1]["function"]["arguments"] += arguments
        deltas = self._new.setdefault("tool_calls", [])
        if not deltas or deltas[-1]["index"] != index:
            deltas.append({"index": index, "function": {"arguments": ""}})
        deltas[-1]["function"]["arguments"] += arguments
