"""The slots of the engine, each a row of a cache, which are also its prefix cache.

A row keeps its tokens until another request needs it. A new request continues the row that shares the longest prefix
with it, or a copy of that; else it takes the row unused for longest. So the memory is fixed from the start. What two
prompts share is read once, even if both come at the same time: the second waits, and copies the row of the first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from bitnet_jax.serving.answer import Answer
from bitnet_jax.serving.pool import Pool

WORTH_A_COPY = 32  # tokens of a prompt that take longer to read than to copy a row


@dataclasses.dataclass(eq=False)
class Slot:
    """A row of a pool: `tokens` are in its cache; `chunked` of them were read in whole chunks from its beginning."""

    pool: Pool
    row: int
    tokens: list[int] = dataclasses.field(default_factory=list)
    chunked: int = 0
    answer: Answer | None = None
    adapter: str | None = None  # with which the tokens were read
    used: int = 0  # the number of the last request that came

    @property
    def reads(self) -> bool:
        """Whether a prompt is still to be read."""
        return self.answer is not None and len(self.tokens) < len(self.answer.request.prompt)

    @property
    def decodes(self) -> bool:
        return self.answer is not None and bool(self.answer.tokens)

    def describe(self) -> dict[str, Any]:
        answer = self.answer  # another thread may set it to None
        state = "idle" if answer is None else "decoding" if answer.tokens else "reading"
        made = {} if answer is None else {"generated_tokens": len(answer.tokens), "seconds": answer.seconds}
        return {"state": state, "tokens_in_cache": len(self.tokens), **made}


class Slots:
    """The rows of all pools.

    Args:
      exact: see `passes.rows_are_exact`. If not, only whole chunks of a prompt are taken from a row, since only these
        are the same bits for every request.
      chunk: tokens of a prompt that are read at once.
    """

    def __init__(self, pools: Sequence[Pool], exact: bool, chunk: int) -> None:
        self._all = [Slot(pool, row) for pool in pools for row in range(pool.rows)]
        self._exact, self._chunk = exact, chunk
        self._placed = self._turn = 0

    def __len__(self) -> int:
        return len(self._all)

    def __iter__(self) -> Iterator[Slot]:
        return iter(self._all)

    @property
    def running(self) -> int:
        return sum(slot.answer is not None for slot in self._all)

    def next_to_read(self) -> Slot | None:
        """The slot whose prompt has its turn."""
        turns = [*self._all[self._turn :], *self._all[: self._turn]]
        slot = next((slot for slot in turns if slot.reads and not self._waits(slot)), None)
        if slot is not None:
            self._turn = (self._all.index(slot) + 1) % len(self._all)
            self._copy_what_others_read(slot)
        return slot

    def _waits(self, slot: Slot) -> bool:
        """Whether an earlier request still reads what the prompt shares with its own."""
        return any(
            other.reads and other.used < slot.used and self._worth_copying(slot, other.answer.request.prompt)
            for other in self._all
            if other.answer is not None and other.adapter == slot.adapter
        )

    def _copy_what_others_read(self, slot: Slot) -> None:
        answer = slot.answer
        assert answer is not None
        prompt = answer.request.prompt
        source = max(self._all, key=lambda other: self._shared(other, prompt, slot.adapter))
        if self._worth_copying(slot, np.asarray(source.tokens, np.int32)):
            count = self._shared(source, prompt, slot.adapter)
            source.pool.copy_row(source.row, slot.row)
            answer.cached += count - len(slot.tokens)
            slot.tokens, slot.chunked = prompt[:count].tolist(), min(source.chunked, count)

    def _worth_copying(self, slot: Slot, tokens: np.ndarray) -> bool:
        """Whether these tokens begin like the prompt of a slot, much further than it has been read."""
        assert slot.answer is not None
        request = slot.answer.request
        shares = self._exact and not request.score_prompt
        return shares and _common(tokens, request.prompt[:-1]) >= len(slot.tokens) + WORTH_A_COPY

    def place(self, answer: Answer) -> None:
        """Gives an answer one of the free slots, with as much of its prompt as any slot has."""
        prompt, adapter = answer.request.prompt, answer.request.adapter
        self._placed += 1
        free = [slot for slot in self._all if slot.answer is None]
        slot = oldest = min(free, key=lambda slot: slot.used)
        source, count = oldest, 0
        if not answer.request.score_prompt:  # else all of it must be read
            shared = [
                (self._shared(slot, prompt, adapter), slot) for slot in (self._all if self._exact else free)
            ]
            count, source = max(shared, key=lambda pair: (pair[0], pair[1] is oldest))
        in_place = source is oldest or (source.answer is None and 2 * count >= self._reusable(source))
        if in_place:
            slot = source  # at most half of what a younger one holds is lost
        elif not self._exact or count < WORTH_A_COPY:
            count = 0
        slot.answer, slot.adapter, slot.used, answer.cached = answer, adapter, self._placed, count
        if count and not in_place:
            source.pool.copy_row(source.row, slot.row)
        slot.tokens, slot.chunked = prompt[:count].tolist(), min(source.chunked, count)

    def _reusable(self, slot: Slot) -> int:
        """Tokens of a slot whose cache is the same, bit for bit, as if another request had read them."""
        return len(slot.tokens) if self._exact else slot.chunked

    def _shared(self, slot: Slot, prompt: np.ndarray, adapter: str | None) -> int:
        """Tokens of a prompt that its answer may take from a slot; the last one must be read, for its logits."""
        if slot.adapter != adapter:
            return 0
        same = _common(np.asarray(slot.tokens[: self._reusable(slot)], np.int32), prompt[:-1])
        return same if self._exact else same - same % self._chunk


def _common(a: np.ndarray, b: np.ndarray) -> int:
    """Tokens with which both begin."""
    most = min(len(a), len(b))
    differ = np.flatnonzero(a[:most] != b[:most])
    return int(differ[0]) if differ.size else most
