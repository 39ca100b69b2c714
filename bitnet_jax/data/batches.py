"""Batches of a token stream or of labelled examples. A batch depends only on its step, so resuming needs no state.

`batch(step, rows)` is the given rows of `batch(step)`, computed alone: a process that trains on some rows of a batch
reads only those.

A stream of N tokens has N - 1 predictions: input i is token i, its target is token i + 1. A window of length T
holds T of them. Shapes: B batch size, T window length.

The order comes from raw Philox words, keyed by (seed, epoch or step). NumPy guarantees these words to be stable
across versions; it gives no such guarantee for `Generator.permutation`. Sampling `shuffle` asks the package grain
instead, which computes single places of a permutation.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from bitnet_jax.data.errors import DataError, check_number
from bitnet_jax.optional_packages import missing_package

SAMPLINGS = ("epoch", "shuffle", "windows")
EVERY_ROW = slice(None)
MANY = 2**20  # windows: their order takes long enough to be computed ahead
MOST_SHUFFLED = 2**31  # windows: grain's index is a 32-bit integer
SHUFFLE_ROUNDS = 4  # as in grain's MapDataset.shuffle


@dataclass(frozen=True, eq=False)
class TokenBatches:
    """Batches for training: `batch(step)` -> {"inputs": int32 [B, T], "targets": int32 [B, T]}.

    sampling `epoch`: consecutive non-overlapping windows, reshuffled every epoch. The epochs form one infinite
      sequence, of which batch(step) is the slice [step * B, (step + 1) * B): every window occurs once per epoch,
      and a batch may span the end of one epoch and the start of the next. The order of an epoch is an array in memory
      (8 bytes a window, three times while it is made).
    sampling `shuffle`: likewise, in another order and without that array, for streams of any size; needs grain.
    sampling `windows`: B independent random positions per step, as in nanoGPT.
    """

    tokens: np.ndarray  # int [N]
    length: int  # T
    batch_size: int  # B
    seed: int = 0
    sampling: str = "epoch"
    # The token before each document. Given, a batch also has "segments" int32 [B, T], the documents of a window counted
    # from its start, and "positions" int32 [B, T], the tokens since the start of the document or of the window.
    separator: int | None = None

    def __post_init__(self) -> None:
        _check(length=self.length, batch_size=self.batch_size, seed=self.seed)
        if self.sampling not in SAMPLINGS:
            raise DataError(f"sampling: got {self.sampling!r}, expected one of {', '.join(SAMPLINGS)}")
        needed = self.batch_size * self.length + 1
        if len(self.tokens) < needed:
            raise DataError(
                f"got a text of {len(self.tokens)} tokens, expected at least {needed} for one batch of "
                f"{self.batch_size} x {self.length}; use more text or a smaller data.batch_size or data.length"
            )
        _ = self._epochs  # an error now if grain is missing

    @property
    def windows(self) -> int:
        """Number of windows per epoch."""
        return (len(self.tokens) - 1) // self.length

    def epoch(self, step: int) -> float:
        """Number of passes over the text before this step."""
        return step * self.batch_size * self.length / (len(self.tokens) - 1)

    def starts(self, step: int) -> np.ndarray:
        """Start positions in the stream of the windows of a step, int64 [B]."""
        _check(step=step)
        if self.sampling == "windows":
            positions = len(self.tokens) - self.length
            return (random_words(self.seed, step, self.batch_size) % np.uint64(positions)).astype(np.int64)
        return self.window_starts(range(step * self.batch_size, (step + 1) * self.batch_size))

    def window_starts(self, places: Iterable[int]) -> np.ndarray:
        """Start positions, int64 [n], of the windows at n places of the sequence of epochs."""
        return self._epochs.items(places) * self.length

    @functools.cached_property
    def _epochs(self) -> Epochs | ShuffledEpochs:
        return (ShuffledEpochs if self.sampling == "shuffle" else Epochs)(self.seed, self.windows)

    def batch(self, step: int, rows: slice = EVERY_ROW) -> dict[str, np.ndarray]:
        return token_batch(
            self.tokens[window_positions(self.starts(step)[rows], self.length)], self.separator
        )


@dataclass(frozen=True, eq=False)
class ExampleBatches:
    """Batches of examples for training: `batch(step)` -> the same names, arrays [B, ...].

    The order is that of TokenBatches with sampling `epoch`: reshuffled passes over all examples.
    """

    examples: Mapping[str, np.ndarray]  # arrays whose first axis is the examples, all of the same length
    batch_size: int  # B
    seed: int = 0

    def __post_init__(self) -> None:
        _check(batch_size=self.batch_size, seed=self.seed)
        sizes = {name: len(array) for name, array in self.examples.items()}
        if len(set(sizes.values())) != 1 or self.count < 1:
            raise DataError(f"got examples {sizes}, expected the same number of each, at least one")

    @property
    def count(self) -> int:
        return len(next(iter(self.examples.values()), ()))

    @functools.cached_property
    def _epochs(self) -> Epochs:
        return Epochs(self.seed, self.count)

    def batch(self, step: int, rows: slice = EVERY_ROW) -> dict[str, np.ndarray]:
        _check(step=step)
        places = range(step * self.batch_size, (step + 1) * self.batch_size)[rows]
        chosen = self._epochs.items(places)
        return {name: array[chosen] for name, array in self.examples.items()}


def whole_batches(examples: Mapping[str, np.ndarray], batch_size: int) -> Iterator[dict[str, np.ndarray]]:
    """All examples in order, B at a time; the last batch is zero-padded, with `weights` float32 [B] 0 for padding."""
    _check(batch_size=batch_size)
    count = len(next(iter(examples.values()), ()))
    for first in range(0, count, batch_size):
        batch = {name: array[first : first + batch_size] for name, array in examples.items()}
        missing = batch_size - len(next(iter(batch.values())))
        filled = {
            name: np.concatenate([array, np.zeros((missing, *array.shape[1:]), array.dtype)])
            for name, array in batch.items()
        }
        yield filled | {"weights": (np.arange(batch_size) < batch_size - missing).astype(np.float32)}


def _check(**numbers: int) -> None:
    """Raise DataError unless lengths and sizes are at least 1, a step at least 0, and a seed fits 64 bits."""
    for name, value in numbers.items():
        if name == "seed":
            if not 0 <= value < 2**64:
                raise DataError(f"seed: got {value}, expected 0 to 2**64 - 1")
        elif name == "step":
            if value < 0:
                raise DataError(f"step: got {value}, expected 0 or more")
        else:
            check_number(name, value)


def consecutive_batches(
    tokens: np.ndarray,
    length: int,
    batch_size: int,
    stride: int | None = None,
    token_bytes: np.ndarray | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """Batches that score every token after the first exactly once, in order.

    Windows begin every `stride` tokens (default: `length`, no overlap). `scored` marks the targets not scored by an
    earlier window: with a stride below the length, each of them has at least length - stride tokens of context,
    except in the first window. The last window and the last batch are zero-padded; padding is not scored.

    Args:
      token_bytes: int [N], bytes of text that each token stands for, see streams.py.

    Yields:
      {"inputs": int32 [B, T], "targets": int32 [B, T], "scored": bool [B, T]}, and with token_bytes also
      "target_bytes": int32 [B, T], the bytes of each target.
    """
    stride = length if stride is None else stride
    if length < 1 or batch_size < 1 or not 1 <= stride <= length:
        raise DataError(
            f"got length {length}, batch_size {batch_size}, stride {stride}; "
            "expected each at least 1 and the stride at most the length"
        )
    predictions = len(tokens) - 1
    if predictions < 1:
        raise DataError(
            f"got a text of {len(tokens)} tokens, expected at least 2 to predict one; use more text"
        )
    if token_bytes is not None and len(token_bytes) != len(tokens):
        raise DataError(
            f"token_bytes: got {len(token_bytes)}, expected one for each of the {len(tokens)} tokens"
        )
    windows = 1 + max(0, -(-(predictions - length) // stride))
    for first in range(0, windows, batch_size):
        window = np.arange(first, first + batch_size)[:, None]
        target = window * stride + 1 + np.arange(length)[None, :]  # position of each target in the stream
        unscored = (window == 0) | (target > (window - 1) * stride + length)
        begin, end = (
            first * stride,
            (first + batch_size - 1) * stride + length + 1,
        )  # of the tokens of this batch
        starts = (window[:, 0] - first) * stride
        batch = token_batch(_padded(tokens, begin, end)[window_positions(starts, length)])
        batch |= {"scored": unscored & (target <= predictions)}
        yield (
            batch
            if token_bytes is None
            else batch | {"target_bytes": _padded(token_bytes, begin, end)[target - begin]}
        )


def _padded(array: np.ndarray, begin: int, end: int) -> np.ndarray:
    """array[begin:end] as int32, with zeros after the end of the array."""
    found = array[begin:end].astype(np.int32)
    return np.pad(found, (0, end - begin - len(found)))


def window_positions(starts: np.ndarray, length: int) -> np.ndarray:
    """Positions [B, length + 1] of the tokens of windows."""
    return starts[:, None] + np.arange(length + 1)[None, :]


def token_batch(windows: np.ndarray, separator: int | None = None) -> dict[str, np.ndarray]:
    """The batch of windows [B, T + 1], see TokenBatches."""
    windows = windows.astype(np.int32)
    batch = {"inputs": windows[:, :-1], "targets": windows[:, 1:]}
    return batch if separator is None else batch | _documents(batch["inputs"], separator)


def _documents(inputs: np.ndarray, separator: int) -> dict[str, np.ndarray]:
    """Segments and positions: a separator is the first token of the document after it."""
    starts, place = inputs == separator, np.arange(inputs.shape[1], dtype=np.int32)
    begins = np.maximum.accumulate(np.where(starts, place, 0), axis=1)
    return {
        "segments": np.cumsum(starts, axis=1, dtype=np.int32),
        "positions": (place - begins).astype(np.int32),
    }


def random_words(seed: int, counter: int, count: int) -> np.ndarray:
    """uint64 [count], a pure function of the arguments."""
    return np.random.Philox(key=np.array([seed, counter], np.uint64)).random_raw(count)


class Epochs:
    """The infinite sequence of shuffled epochs over `count` items."""

    def __init__(self, seed: int, count: int) -> None:
        self._count = count
        threads = ThreadPoolExecutor(1)

        @functools.lru_cache(maxsize=2)  # a batch spans at most two epochs
        def order(epoch: int) -> Future[np.ndarray]:
            return threads.submit(lambda: stable_order(random_words(seed, epoch, count)))

        self._order = order
        if count >= MANY:
            order(0)  # while the model is being compiled

    def items(self, places: Iterable[int]) -> np.ndarray:
        """The items, int64 [n], at n places of the sequence."""
        return np.array([self._order(i // self._count).result()[i % self._count] for i in places], np.int64)


def stable_order(words: np.ndarray) -> np.ndarray:
    """np.argsort(words, kind="stable") of uint64 [n], int64 [n]; for millions of them in a third of the time.

    Sorted are not indices by their words but numbers: the high bits of a word, and its index in place of the others.
    """
    bits = max(len(words) - 1, 1).bit_length()
    low = np.uint64((1 << bits) - 1)
    numbers = (words & ~low) | np.arange(len(words), dtype=np.uint64)
    numbers.sort()
    order = (numbers & low).astype(np.int64)
    high = numbers >> np.uint64(bits)
    ties = np.flatnonzero(high[1:] == high[:-1])
    if len(ties):  # the lower bits, and then the index, decide
        places = np.union1d(ties, ties + 1)
        tied = order[places]
        order[places] = tied[np.lexsort((tied, words[tied]))]
    return order


class ShuffledEpochs:
    """Likewise, in the order of grain's permutation, whose 32-bit seed is a Philox word of (seed, epoch)."""

    def __init__(self, seed: int, count: int) -> None:
        if count > MOST_SHUFFLED:
            raise DataError(
                f"sampling 'shuffle': got {count} windows, expected at most {MOST_SHUFFLED}; use a larger data.length"
            )
        self._seed, self._count, self._item = seed, count, _index_shuffle()

    def items(self, places: Iterable[int]) -> np.ndarray:
        return np.array([self._at(*divmod(int(i), self._count)) for i in places], np.int64)

    def _at(self, epoch: int, position: int) -> int:
        word = int(random_words(self._seed, epoch, 1)[0]) % 2**32
        return self._item(index=position, max_index=self._count - 1, seed=word, rounds=SHUFFLE_ROUNDS)


@functools.cache
def _index_shuffle() -> Callable[..., int]:
    try:
        from grain.experimental import index_shuffle
    except ImportError as error:
        raise DataError(f"sampling 'shuffle': {missing_package('grain')}") from error
    shuffle: Callable[..., int] = index_shuffle
    return shuffle
