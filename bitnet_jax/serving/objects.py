"""Events of the engine to objects of the OpenAI API: completions, and the chunks of their streams."""

from __future__ import annotations

import codecs
import secrets
import time
from collections.abc import Iterable
from typing import Any

from bitnet_jax.serving.requests import Event, Finished, Piece, PromptScores, TokenScore
from bitnet_jax.serving.schemas import Asked, Served
from bitnet_jax.serving.tool_calls import ToolCalls

NAMES = {True: ("chatcmpl", "chat.completion"), False: ("cmpl", "text_completion")}


class Choice:
    """One choice while its events come: `take` returns what is new, as the fields of a choice of a chunk."""

    def __init__(self, asked: Asked, served: Served, index: int) -> None:
        self._asked, self._served, self.index = asked, served, index
        self.finished: Finished | None = None
        self._calls = ToolCalls(asked.tools.names, asked.requests[index]) if asked.tools else None
        self._offset = 0  # characters before the next token
        self._characters = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.news: list[Any] = []  # what the chunks say: deltas of a chat, else texts
        self._logprobs: list[Any] = []

    def begin(self) -> dict[str, Any] | None:
        """The first chunk of a chat, and the prompt of a completion that is echoed without log-probabilities."""
        if self._asked.chat:
            return self._chunk({"role": "assistant", "content": ""}, None)
        if self._asked.echo is not None and self._asked.top is None:
            return self._chunk(self._asked.echo[self.index], None)
        return None

    def take(self, event: Event) -> dict[str, Any] | None:
        if isinstance(event, Finished):
            self.finished = event
            rest = self._calls.finish() if self._calls else {}
            return self._chunk(rest if self._asked.chat else "", None, self._reason)
        if isinstance(event, PromptScores):
            assert self._asked.echo is not None
            return self._chunk(self._asked.echo[self.index], self._scored(event.scores))
        assert isinstance(event, Piece)
        scores = self._scored(event.scores) if event.scores else None
        if self._calls is not None:
            new = self._calls.push(event.text)
            return self._chunk(new, scores) if new or scores else None
        return self._chunk({"content": event.text} if self._asked.chat else event.text, scores)

    def whole(self) -> dict[str, Any]:
        """The choice of an answer that is not streamed, once it is finished."""
        assert self.finished is not None
        texts = [new.get("content", "") for new in self.news] if self._asked.chat else self.news
        text, scored = "".join(texts), self._asked.top is not None
        logprobs = _joined(self._logprobs) if scored else None
        choice: dict[str, Any] = {
            "index": self.index,
            "finish_reason": self._reason,
            "logprobs": logprobs,
        }
        if self._asked.chat:
            logprobs_or_none = logprobs or ({"content": [], "refusal": None} if scored else None)
            message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
            if self._calls is not None and self._calls.calls:
                message |= {"content": text or None, "tool_calls": self._calls.calls}
            return choice | {"message": message, "logprobs": logprobs_or_none}
        return choice | {"text": text}

    @property
    def _reason(self) -> str:
        assert self.finished is not None
        called = self._calls is not None and self._calls.calls and self.finished.reason == "stop"
        return "tool_calls" if called else self.finished.reason

    def _chunk(self, new: Any, logprobs: Any, reason: str | None = None) -> dict[str, Any]:
        self.news.append(new)
        if logprobs is not None:
            self._logprobs.append(logprobs)
        name = "delta" if self._asked.chat else "text"
        return {"index": self.index, name: new, "logprobs": logprobs, "finish_reason": reason}

    def _scored(self, scores: Iterable[TokenScore]) -> dict[str, Any]:
        return self._chat_logprobs(scores) if self._asked.chat else self._legacy_logprobs(scores)

    def _chat_logprobs(self, scores: Iterable[TokenScore]) -> dict[str, Any]:
        def entry(token: int, ln: float | None) -> dict[str, Any]:
            data = self._served.bytes_of(token)
            return {"token": data.decode(errors="replace"), "logprob": _finite(ln), "bytes": list(data)}

        return {
            "content": [
                entry(score.token, score.log_probability)
                | {"top_logprobs": [entry(*pair) for pair in score.top[: self._asked.top]]}
                for score in scores
                if score.token not in self._served.conversation.end
            ],
            "refusal": None,
        }

    def _legacy_logprobs(self, scores: Iterable[TokenScore]) -> dict[str, Any]:
        """Of prompt and answer, an end token included: lm-evaluation-harness leaves out the last one by position."""
        lists: dict[str, list[Any]] = {
            "tokens": [],
            "token_logprobs": [],
            "top_logprobs": [],
            "text_offset": [],
        }
        for token, ln, top in scores:
            lists["tokens"].append(self._name(token))
            lists["token_logprobs"].append(None if ln is None else _finite(ln))
            likely = {self._name(other): _finite(value) for other, value in top[: self._asked.top]}
            lists["top_logprobs"].append(None if ln is None else {self._name(token): _finite(ln)} | likely)
            lists["text_offset"].append(self._offset)
            if token not in self._served.special:
                self._offset += len(self._characters.decode(self._served.bytes_of(token)))
        return lists

    def _name(self, token: int) -> str:
        """The text of a token; of a part of a character its bytes, in the form of OpenAI's legacy API."""
        data = self._served.bytes_of(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _finite(ln: float | None) -> float:
    """JSON has no infinities; OpenAI's -9999.0 stands for a probability of 0."""
    return -9999.0 if ln is None or not ln > -9999.0 else ln


def _joined(parts: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Log-probabilities of several chunks as those of one."""
    if not parts:
        return None
    return {
        name: None if values is None else [value for part in parts for value in part[name]]
        for name, values in parts[0].items()
    }


class Envelope:
    """What all chunks of an answer, or the whole answer, have in common."""

    def __init__(self, asked: Asked, served: Served) -> None:
        prefix, self._object = NAMES[asked.chat]
        self._asked = asked
        self._fixed = {
            "id": f"{prefix}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": asked.model(served),
        }

    def chunk(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None = None) -> dict[str, Any]:
        kind = self._object + (".chunk" if self._asked.chat else "")
        chunk = {**self._fixed, "object": kind, "choices": choices}
        return chunk | {"usage": usage} if self._asked.include_usage else chunk

    def last(self, choices: list[Choice]) -> dict[str, Any] | None:
        """The chunk behind all others, without choices, if it was asked for."""
        return self.chunk([], self.usage(choices)) if self._asked.include_usage else None

    def whole(self, choices: list[Choice]) -> dict[str, Any]:
        parts = [choice.whole() for choice in choices]
        return {**self._fixed, "object": self._object, "choices": parts, "usage": self.usage(choices)}

    def usage(self, choices: list[Choice]) -> dict[str, Any]:
        """Tokens of all choices; a prompt counts once, however many choices it has."""
        ends = [choice.finished for choice in choices if choice.finished is not None]
        prompts: dict[int, Finished] = {}
        for request, end in zip(self._asked.requests, ends, strict=True):
            prompts.setdefault(id(request.prompt), end)
        prompt = sum(end.prompt_tokens for end in prompts.values())
        completion = sum(end.completion_tokens for end in ends)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": sum(end.cached_tokens for end in prompts.values())},
        }
