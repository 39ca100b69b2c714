"""A conversation in the terminal: its messages, its commands, and the answers of an engine with one slot."""

from __future__ import annotations

import json
import queue
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from bitnet_jax.data.chat_template import chat_ids
from bitnet_jax.data.conversation import Conversation
from bitnet_jax.data.files import parse_json
from bitnet_jax.inference.generation import GREEDY
from bitnet_jax.inference.sampling import SamplingConfig
from bitnet_jax.serving.engine import Engine
from bitnet_jax.serving.requests import Event, Finished, Piece, Request

HELP = """\
/reset          forget the conversation, but not the system message
/system TEXT    set the system message, or remove it without TEXT, and forget the conversation
/save FILE      write the conversation to a new file
/load FILE      continue the conversation of a file
/stats          what was read and generated so far
/help           this list
/exit           leave, as Ctrl-D does
A line that ends with \\ continues on the next one. Ctrl-C ends an answer."""

Show = Callable[[str], None]


class Chat:
    """Messages so far, and the engine that answers them; `engine.run` works in another thread.

    Args:
      max_tokens: of an answer; None: what the context leaves.
    """

    def __init__(
        self,
        engine: Engine,
        conversation: Conversation,
        *,
        system: str | None = None,
        sampling: SamplingConfig = GREEDY,
        seed: int = 0,
        max_tokens: int | None = None,
    ) -> None:
        self._engine, self._conversation = engine, conversation
        self._sampling, self._seed, self._max_tokens = sampling, seed, max_tokens
        self.messages: list[dict[str, str]] = []
        self.set_system(system)

    def set_system(self, text: str | None) -> None:
        """Begins a conversation with this system message, or none."""
        self.messages = [{"role": "system", "content": text}] if text else []

    def reset(self) -> None:
        """Begins a conversation with the same system message."""
        self.messages = [message for message in self.messages[:1] if message["role"] == "system"]

    def ask(self, text: str, show: Show) -> Finished:
        """Shows the answer to a message as it comes; Ctrl-C ends it, and what was shown remains in the conversation.

        Raises:
          ValueError: the conversation exceeds the context, or has no chat template; it is then as before.
          RuntimeError: the engine failed.
        """
        asked = [*self.messages, {"role": "user", "content": text}]
        prompt = chat_ids(self._engine.tokenizer, self._conversation, asked)
        most = self._max_tokens or max(1, self._engine.context - len(prompt))
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        answer = self._engine.submit(self._request(prompt, most), events.put)
        shown = ""
        while True:
            try:
                event = events.get()
                if isinstance(event, Piece):
                    show(event.text)
                    shown += event.text
                elif isinstance(event, Finished):
                    break
            except KeyboardInterrupt:
                answer.cancel()
        if event.reason == "error":
            raise RuntimeError(f"the engine failed: {event.message}")
        if shown or event.reason != "cancelled":
            self.messages = [*asked, {"role": "assistant", "content": shown}]
        return event

    def _request(self, prompt: np.ndarray, max_tokens: int) -> Request:
        turns = sum(message["role"] == "user" for message in self.messages)
        return Request(
            prompt=prompt,
            max_tokens=max_tokens,
            sampling=self._sampling,
            seed=self._seed + turns,
            end=self._conversation.end,
        )

    def save(self, path: Path) -> None:
        """Raises FileExistsError, OSError."""
        with path.open("x", encoding="utf-8") as file:
            json.dump({"messages": self.messages}, file, ensure_ascii=False, indent=2)
            file.write("\n")

    def load(self, path: Path) -> None:
        """Raises ValueError: not a conversation; OSError."""
        saved = parse_json(path.read_text(encoding="utf-8"), str(path), "a file of /save")
        messages = saved.get("messages") if isinstance(saved, dict) else None
        if not isinstance(messages, list) or not all(map(_is_message, messages)):
            raise ValueError(
                f"{path}: got no list of messages with role and content, expected a file of /save"
            )
        self.messages = messages

    def command(self, line: str) -> str:
        """Carries out a line such as "/reset"; what to print. Raises ValueError, OSError."""
        name, _, rest = line[1:].partition(" ")
        rest = rest.strip()
        if name in ("save", "load") and not rest:
            raise ValueError(f"got /{name} without a file, expected /{name} FILE")
        match name:
            case "reset":
                self.reset()
            case "system":
                self.set_system(rest)
            case "save":
                self.save(Path(rest).expanduser())
            case "load":
                self.load(Path(rest).expanduser())
                return f"{len(self.messages)} messages"
            case "stats":
                return self._stats()
            case "help":
                return HELP
            case _:
                raise ValueError(f"got /{name}, which is no command; /help lists them")
        return ""

    def _stats(self) -> str:
        counters = self._engine.counters
        return (
            f"{len(self.messages)} messages; prompts of {counters.prompt_tokens} tokens, {counters.cached_tokens} of "
            f"them from the cache; {counters.generated_tokens} tokens generated; context {self._engine.context}"
        )


def _is_message(message: Any) -> bool:
    fields = {"role", "content"}
    return (
        isinstance(message, dict)
        and message.keys() == fields
        and all(isinstance(message[f], str) for f in fields)
    )


def describe(finished: Finished) -> str:
    """Speed and time to the first token of an answer, as one line."""
    first, tokens = finished.first_seconds, finished.completion_tokens
    if first is None:
        return "[no tokens]"
    after = finished.seconds - first
    speed = f"{(tokens - 1) / after:.1f} tokens/s" if tokens > 1 and after > 0 else "too few to time"
    ended = {"length": ", cut at its length", "cancelled": ", interrupted"}.get(finished.reason, "")
    return (
        f"[{tokens} tokens, {speed}; first after {first:.2f} s, {finished.cached_tokens} of {finished.prompt_tokens} "
        f"prompt tokens cached{ended}]"
    )


def turns(read: Callable[[], str | None]) -> Iterator[str]:
    """Lines until the end of the input; one that ends with a backslash is joined to the next one."""
    held = ""
    while (line := read()) is not None:
        if line.endswith("\\"):
            held += line[:-1] + "\n"
            continue
        yield held + line
        held = ""
    if held:
        yield held
