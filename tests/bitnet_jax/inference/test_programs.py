"""The cache of compiled programs: eviction, and constant memory in long-running processes."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitnet_jax.evaluation import classification, classifiers, language, likelihood
from bitnet_jax.inference import programs
from bitnet_jax.inference.programs import PROGRAMS, Programs, only_cpu
from bitnet_kernels import cpu, rms_norm


def scaled(factor: float, x: jax.Array) -> jax.Array:
    return x * factor


def test_a_program_is_compiled_once_and_the_least_recently_used_one_is_evicted(
    compilations: list[str],
) -> None:
    kept, x = Programs(max_size=2), jnp.ones(3)
    first, second = kept.of(scaled, 2.0), kept.of(scaled, 3.0)
    np.testing.assert_array_equal(first(x) + second(x), 5 * np.ones(3))
    compilations.clear()
    assert kept.of(scaled, 2.0) is first
    first(x)
    assert not compilations
    third = kept.of(scaled, 2.0, shapes=(3,))
    assert (len(kept), kept.of(scaled, 2.0), kept.of(scaled, 2.0, shapes=(3,))) == (
        2,
        first,
        third,
    )
    gone = weakref.ref(second)
    del second
    gc.collect()
    assert gone() is None


def test_a_program_compiled_in_the_background_is_not_compiled_again(compilations: list[str]) -> None:
    program, x = Programs().of(scaled, 4.0), jnp.ones(5)
    compilations.clear()
    program.compile_in_background(jax.ShapeDtypeStruct((5,), jnp.float32), after=now())
    np.testing.assert_array_equal(program(x), 4 * np.ones(5))
    assert len(compilations) == 1


def test_a_program_is_compiled_in_the_background_after_an_event_or_a_while(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    traced: list[float] = []
    argument = jax.ShapeDtypeStruct((5,), jnp.float32)

    def noted(factor: float, x: jax.Array) -> jax.Array:
        traced.append(factor)
        return x * factor

    event, kept = threading.Event(), Programs()
    monkeypatch.setattr(programs, "PATIENCE", 60)
    kept.of(noted, 1.0).compile_in_background(argument, after=event)
    time.sleep(0.2)  # in which it would be traced
    assert not traced
    event.set()
    kept.of(noted, 1.0)(jnp.ones(5))
    assert traced == [1.0]
    monkeypatch.setattr(programs, "PATIENCE", 0.01)
    kept.of(noted, 2.0).compile_in_background(argument, after=threading.Event())
    kept.of(noted, 2.0)(jnp.ones(5))
    assert traced == [1.0, 2.0]


def now() -> threading.Event:
    event = threading.Event()
    event.set()
    return event


def test_an_error_in_the_background_is_raised_by_the_call() -> None:
    program = Programs().of(jnp.dot, jnp.float32)
    program.compile_in_background(jax.ShapeDtypeStruct((5,), jnp.float32), after=now())
    with pytest.raises(TypeError):
        program(jnp.ones(5))


def test_a_program_holds_no_operations_for_platforms_that_are_not_there() -> None:
    """Where only a CPU is, nothing else is traced."""
    if not only_cpu() or cpu.unavailable():
        pytest.skip("needs a process with a CPU alone, and the kernels")
    known, open_to_all = (jax.make_jaxpr(f)(jnp.ones((2, 8))) for f in (in_a_program, norm_of))
    assert "rsqrt" not in str(known)
    assert "rsqrt" in str(open_to_all)


def norm_of(x: jax.Array) -> jax.Array:
    return rms_norm(x, eps=1e-5)


def in_a_program(x: jax.Array) -> jax.Array:
    result: jax.Array = Programs().of(norm_of)(x)
    return result


def maps() -> int:
    return len(Path("/proc/self/maps").read_text().splitlines())


@pytest.mark.extended
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="this system does not list memory maps")
def test_evicted_programs_leave_no_memory_maps() -> None:
    programs, counts = Programs(max_size=2), []
    for size in range(3, 15):
        x = jnp.asarray(np.ones((size, size), np.float32))
        jax.block_until_ready(programs.of(partial_sums, shapes=x.shape)(x))
        gc.collect()
        counts.append(maps())
    assert max(counts[6:]) - min(counts[3:6]) < 10


def partial_sums(x: jax.Array) -> jax.Array:
    return jnp.sort(jnp.cumsum(jnp.sin(x @ x), axis=0), axis=1)


@pytest.mark.parametrize(
    "module", [classification, classifiers, language, likelihood], ids=lambda module: module.__name__
)
def test_evaluation_programs_are_bounded_too(module: Any) -> None:
    assert module.PROGRAMS is PROGRAMS
    assert not any(
        hasattr(value, "clear_cache") for value in vars(module).values()
    )  # nothing is jitted outside the cache


SOAK = Path(__file__).parent / "soak.py"


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="this system does not list memory maps")
@pytest.mark.parametrize(("rounds", "longest"), [(60, 48), pytest.param(500, 160, marks=pytest.mark.slow)])
def test_new_lengths_do_not_grow_memory_maps_memory_or_compilations(
    rounds: int, longest: int, repository: Path
) -> None:
    """In a separate process: generates, streams and scores texts, each of a new length."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(repository), str(repository / "kernels")])}
    done = subprocess.run(
        [sys.executable, str(SOAK), str(rounds), str(longest)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    settled, end = json.loads(done.stdout)
    assert end["compilations"] == settled["compilations"]
    assert end["maps"] - settled["maps"] < 50
    # Python's own objects vary; 500 programs, one per length, would take gigabytes.
    assert end["bytes"] - settled["bytes"] < 20e6
