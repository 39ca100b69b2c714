"""A bounded LRU cache of compiled programs, for processes that serve many models and shapes.

    program = PROGRAMS.of(function, config, shapes=tokens.shape)    # jax.jit(partial(function, config))
    program(variables, tokens)

A module-level `jax.jit` keeps an executable for every combination of static arguments and shapes it has seen, and
each uses a few hundred memory maps, which are limited per process (Linux: vm.max_map_count). Here every combination
has its own jitted function, and evicting it frees the executable. Programs that users jit are not affected.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any

import jax

# At 100 to 300 memory maps each; a model of 4096 positions has about 50 programs per batch size.
MAX_PROGRAMS = 128


class Programs:
    """The `max_size` most recently used jitted functions, by function, static arguments and shapes."""

    def __init__(self, max_size: int = MAX_PROGRAMS) -> None:
        self._max_size = max_size
        self._kept: OrderedDict[Hashable, Callable[..., Any]] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._kept)

    def of(
        self,
        function: Callable[..., Any],
        *static: Hashable,
        shapes: Hashable = (),
        donate: tuple[int, ...] = (),
    ) -> Callable[..., Any]:
        """`function(*static, ...)`, jitted in the remaining arguments.

        Args:
          function: a module-level function; it is part of the key.
          static: its first arguments.
          shapes: whatever else determines the compiled program: all shapes and tree structures that vary between
            calls with the same static arguments.
          donate: positions of donated buffers among the remaining arguments.
        """
        key = (function, static, shapes)
        with self._lock:
            program = self._kept.get(key)
            if program is None:
                program = self._kept[key] = jax.jit(partial(function, *static), donate_argnums=donate)
                while len(self._kept) > self._max_size:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(key)
        return program


PROGRAMS = Programs()
