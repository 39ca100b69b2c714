"""A bounded LRU cache of compiled programs, for processes that serve many models and shapes.

    program = PROGRAMS.of(function, config, shapes=tokens.shape)    # jax.jit(partial(function, config))
    program(variables, tokens)

A module-level `jax.jit` keeps an executable for every combination of static arguments and shapes it has seen, and
each uses a few hundred memory maps, which are limited per process (Linux: vm.max_map_count). Here every combination
has its own jitted function, and evicting it frees the executable. Programs that users jit are not affected.
"""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any

import jax
import jax.extend

from bitnet_kernels.cpu import for_cpu_alone

# At 100 to 300 memory maps each; a model of 4096 positions has about 50 programs per batch size.
MAX_PROGRAMS = 128
# Seconds in which a program comes from the compilation cache. Tracing another one meanwhile would delay it, since only
# one thread runs Python; a compilation, which takes longer, does not need Python.
PATIENCE = 0.25


class Program:
    """A jitted function that can be compiled beside other work, before its arguments exist."""

    def __init__(self, function: Callable[..., Any], donate: tuple[int, ...]) -> None:
        def traced(*args: Any) -> Any:
            with for_cpu_alone() if only_cpu() else contextlib.nullcontext():
                return function(*args)

        # The name in profiles and in the compilation cache.
        traced.__name__ = getattr(function, "func", function).__name__
        self._jitted = jax.jit(traced, donate_argnums=donate)
        self._compiling: threading.Thread | None = None
        self.known = False  # compiled, or being compiled

    def lower(self, *args: Any) -> jax.stages.Lowered:
        """Traced for arguments of these shapes, arrays or `jax.ShapeDtypeStruct`s. After `lower(...).compile()` a call
        with such arguments compiles nothing."""
        return self._jitted.lower(*args)

    def compile_in_background(self, *args: Any, after: threading.Event) -> None:
        """Traces and compiles for arguments of these shapes in a thread, once `after` is set or PATIENCE seconds have
        passed; a later call waits for it."""

        def compile() -> None:
            after.wait(PATIENCE)
            with contextlib.suppress(Exception):  # the call compiles again, and raises
                self.lower(*args).compile()

        self.known = True
        self._compiling = threading.Thread(target=compile, name="compile")
        self._compiling.start()

    def __call__(self, *args: Any) -> Any:
        self.known = True
        compiling = self._compiling  # another thread may set it to None
        if compiling is not None:
            compiling.join()
            self._compiling = None
        return self._jitted(*args)


def only_cpu() -> bool:
    """Whether this process has no other devices, on which a program could be called too."""
    return set(jax.extend.backend.backends()) <= {"cpu", "interpreter"}


class Programs:
    """The `max_size` most recently used jitted functions, by function, static arguments and shapes."""

    def __init__(self, max_size: int = MAX_PROGRAMS) -> None:
        self._max_size = max_size
        self._kept: OrderedDict[Hashable, Program] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._kept)

    def of(
        self,
        function: Callable[..., Any],
        *static: Hashable,
        shapes: Hashable = (),
        donate: tuple[int, ...] = (),
    ) -> Program:
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
                program = self._kept[key] = Program(partial(function, *static), donate)
                while len(self._kept) > self._max_size:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(key)
        return program


PROGRAMS = Programs()
