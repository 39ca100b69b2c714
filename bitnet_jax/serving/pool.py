"""A cache of R rows on the device, and its passes as compiled programs."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from bitnet_jax.inference.cache import init_cache
from bitnet_jax.inference.programs import PROGRAMS, Program
from bitnet_jax.inference.sampling import Filters
from bitnet_jax.inference.steps import Variables
from bitnet_jax.models import ModelConfig
from bitnet_jax.serving import passes

SMALLEST_WIDTH = 16


def width(tokens: int, chunk: int) -> int:
    """The padded length of a pass over `tokens` tokens: a power of two, at most `chunk`."""
    return min(max(SMALLEST_WIDTH, 1 << (tokens - 1).bit_length()), chunk)


def decoded_rows(active: int, rows: int) -> int:
    """The rows of a decode pass for `active` answers."""
    return min(1 << (active - 1).bit_length(), rows)


class Pool:
    """R rows of S positions. The arrays are donated from pass to pass, so a pool has one thread.

    Args:
      variables: of the model without an adapter (None), and with each one by its name.
    """

    def __init__(
        self,
        config: ModelConfig,
        variables: Mapping[str | None, Variables],
        rows: int,
        room: int,
        kv_format: str,
    ) -> None:
        self._config, self._variables, self._kv_format = config, variables, kv_format
        self.rows, self.room = rows, room
        self.clear()

    def clear(self) -> None:
        self._layers: Any = init_cache(self._config, self.rows, self.room, self._kv_format).layers

    def read_tokens(
        self,
        row: int,
        tokens: np.ndarray,
        start: int,
        chunk: int,
        every_position: bool,
        adapter: str | None = None,
    ) -> Any:
        """Logits [1, V] after the last of the tokens, or [W, V]; see `passes.read_tokens`."""
        W = width(len(tokens), chunk)
        padded = np.zeros(W, np.int32)
        padded[: len(tokens)] = tokens
        numbers = np.int32(row), padded, np.int32(start), np.int32(len(tokens))
        read = self._reading(W, every_position, adapter)
        logits, self._layers = read(self._variables[adapter], self._layers, *numbers)
        # JAX would return at once, and all chunks of a prompt be queued before anyone else's pass.
        return jax.block_until_ready(logits)

    def decode(
        self, rows: Sequence[int], tokens: Sequence[int], lengths: Sequence[int], adapter: str | None = None
    ) -> Any:
        """Logits [B, V], of which the first are those of these rows; see `passes.decode`.

        B is a power of two, or all rows; other rows fill it, with a token at a position that no one reads.
        """
        others = [row for row in range(self.rows) if row not in rows]
        others = others[: decoded_rows(len(rows), self.rows) - len(rows)]
        numbers = (
            np.array([*rows, *others], np.int32),
            np.array([*tokens, *(0 for _ in others)], np.int32),
            np.array([*lengths, *(self.room - 1 for _ in others)], np.int32),
        )
        decode = self._decoding(len(numbers[0]), adapter)
        logits, self._layers = decode(self._variables[adapter], self._layers, *numbers)
        return logits

    def compile(self, chunk: int) -> threading.Thread:
        """Compiles the passes of ordinary requests: the smallest ones now, the others in the thread that it returns.
        Runs none."""
        widths = sorted({width(n, chunk) for n in range(1, chunk + 1)})
        counts = sorted({decoded_rows(n, self.rows) for n in range(1, self.rows + 1)})
        zero, layers = np.int32(0), jax.eval_shape(lambda: self._layers)
        kinds = list(self._variables)[:2]  # adapters are alike: one stands for all
        readers = [
            (adapter, self._reading(W, False, adapter), (zero, np.zeros(W, np.int32), zero, zero))
            for adapter in kinds
            for W in widths
        ]
        decoders = [
            (adapter, self._decoding(B, adapter), (np.zeros(B, np.int32),) * 3)
            for adapter in kinds
            for B in counts
        ]
        (first, *others), (second, *more) = readers, decoders

        def compile(programs: Sequence[tuple[str | None, Program, tuple[Any, ...]]]) -> None:
            for adapter, program, numbers in programs:
                program.lower(self._variables[adapter], layers, *numbers).compile()

        compile([first, second])
        # Python must not exit while XLA compiles, so unlike the engine's thread this one is no daemon.
        thread = threading.Thread(target=compile, args=([*others, *more],), name="compile", daemon=False)
        thread.start()
        return thread

    def _reading(self, W: int, every_position: bool, adapter: str | None) -> Program:
        shapes = W, adapter is None
        return self._program(passes.read_tokens, self._config, every_position, shapes=shapes, donate=(1,))

    def _decoding(self, B: int, adapter: str | None) -> Program:
        return self._program(passes.decode, self._config, shapes=(B, adapter is None), donate=(1,))

    def copy_row(self, source: int, target: int) -> None:
        program = self._program(passes.copy_row, shapes=(self._config,), donate=(0,))
        self._layers = program(self._layers, np.int32(source), np.int32(target))

    def _program(
        self, function: Any, *static: Any, shapes: tuple[Any, ...], donate: tuple[int, ...]
    ) -> Program:
        key = (self.rows, self.room, self._kv_format, "packed" in self._variables[None], *shapes)
        return PROGRAMS.of(function, *static, shapes=key, donate=donate)


def row_of(logits: Any, row: int) -> Any:
    """One row of logits [N, V], as [1, V]."""
    if logits.shape[0] == 1:
        return logits
    return PROGRAMS.of(passes.row_of, shapes=logits.shape)(logits, np.int32(row))


def choose(
    filters: Filters,
    logits: Any,
    key: np.ndarray,
    step: int,
    added: np.ndarray | None = None,
    seen: np.ndarray | None = None,
) -> int:
    """See `passes.choose`."""
    program = PROGRAMS.of(passes.choose, shapes=(logits.shape, jax.tree.structure((filters, added, seen))))
    return int(program(filters, logits, key, np.int32(step), added, seen))


def draft_tokens(text: np.ndarray, last: int, count: int) -> np.ndarray | None:
    """See `prompt_lookup.draft`; None if nothing is found."""
    program = PROGRAMS.of(passes.draft, count, shapes=text.shape)
    draft, found = program(text, np.int32(last))
    return np.asarray(draft) if found else None


def score(logits: Any, targets: np.ndarray) -> passes.Scores:
    """See `passes.score`; of at most N targets, as NumPy arrays."""
    padded = np.zeros(logits.shape[0], np.int32)
    padded[: len(targets)] = targets
    found = PROGRAMS.of(passes.score, shapes=logits.shape)(logits, padded)
    return passes.Scores(*(np.asarray(x)[: len(targets)] for x in found))
