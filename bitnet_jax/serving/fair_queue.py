"""A queue in which clients take turns, so that one with many requests does not keep the others waiting."""

from __future__ import annotations

import itertools
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class FairQueue(Generic[T]):
    """First come, first served within a client; between clients one each in turn."""

    def __init__(self) -> None:
        self._waiting: OrderedDict[str, deque[T]] = OrderedDict()
        self._count = 0  # read by other threads, as `len`

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[T]:
        return itertools.chain.from_iterable(self._waiting.values())

    def push(self, client: str, item: T) -> None:
        self._waiting.setdefault(client, deque()).append(item)
        self._count += 1

    def pop(self) -> T:
        """The next item. Raises KeyError if there is none."""
        client, items = self._waiting.popitem(last=False)
        item = items.popleft()
        self._count -= 1
        if items:
            self._waiting[client] = items  # behind the others
        return item

    def remove(self, unwanted: Callable[[T], bool]) -> list[T]:
        """Removes items, and returns them."""
        removed = [item for items in self._waiting.values() for item in items if unwanted(item)]
        if removed:
            self._count -= len(removed)
            kept = {c: deque(i for i in items if not unwanted(i)) for c, items in self._waiting.items()}
            self._waiting = OrderedDict((client, items) for client, items in kept.items() if items)
        return removed
