"""Test configuration: strict JAX, two CPU devices, markers for slow and hardware tests, external data.

    pytest                          the quick suite
    pytest --extended               also the tests marked extended, as continuous integration does
    pytest --run-slow               all of them, also those marked slow (or BITNET_JAX_RUN_SLOW=1)
    JAX_PLATFORMS=cuda,cpu pytest -m gpu    on a machine with a GPU

Strict promotion is for our own code. Optax computes `decay ** step` with an int32 step, which it refuses, so
bitnet_jax.training.optimizers traces optax's update under `jax.numpy_dtype_promotion("standard")`.
"""

from __future__ import annotations

import gc
import os
import signal
from collections import Counter
from pathlib import Path
from typing import Any

# Both are read when the backend starts, so they must be set before anything imports jax.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
TWO_DEVICES = "--xla_force_host_platform_device_count=2"
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {TWO_DEVICES}".strip()
XLA_FLAGS = os.environ["XLA_FLAGS"]

os.environ.setdefault("BITNET_JAX_CACHE", "off")  # tests of the cache set their own folder

# What one process has compiled, the other worker, commands that tests start, and the next run of the tests find here.
ROOT = Path(__file__).resolve().parent.parent
COMPILED, COMPILED_BYTES = ROOT / ".pytest_cache" / "compiled", 1 << 29
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(COMPILED))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "0")

import jax  # noqa: E402
import pytest  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402
from jax._src import compiler  # noqa: E402

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# How fast examples are drawn and run says something about the machine and its load, not about the code.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")

# Shells start background jobs with SIGINT ignored, and children inherit that; tests of Ctrl-C need it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

OPTIMIZED = pytest.StashKey[bool]()  # whether a test compiles with XLA's optimizations


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--extended", action="store_true", help="also run the tests marked extended")
    parser.addoption("--run-slow", action="store_true", help="also run the tests marked extended and slow")


def pytest_sessionstart(session: pytest.Session) -> None:
    from bitnet_jax.data.cache import evict  # late: what checks annotations hooks imports first

    if not hasattr(session.config, "workerinput"):
        evict(COMPILED.glob("*"), COMPILED_BYTES)


def pytest_collectstart() -> None:
    compile_optimized(False)  # files of tests may compile programs when they are imported


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    run_slow = config.getoption("--run-slow") or os.environ.get("BITNET_JAX_RUN_SLOW") == "1"
    extended = run_slow or config.getoption("--extended")
    cases: Counter[str] = Counter()
    for item in items:
        test = item.nodeid.partition("[")[0]
        item.stash[OPTIMIZED] = is_marked(item, "optimized") and (run_slow or cases[test] == 0)
        if is_marked(item, "slow", cases[test]) and not run_slow:
            item.add_marker(pytest.mark.skip(reason="slow: ask with --run-slow or BITNET_JAX_RUN_SLOW=1"))
        elif is_marked(item, "extended", cases[test]) and not extended:
            item.add_marker(
                pytest.mark.skip(reason="extended: ask with --extended; continuous integration does")
            )
        cases[test] += 1
        for platform in ("gpu", "tpu"):
            # The backend is queried only where a marker requires it: collection must not initialize a device.
            if item.get_closest_marker(platform) and jax.default_backend() != platform:
                reason = f"needs a {platform}, this run has {jax.default_backend()!r} (see JAX_PLATFORMS)"
                item.add_marker(pytest.mark.skip(reason=reason))
    # Optimized and other tests share no programs: within a file, those marked optimized run after all others.
    files = {path: number for number, path in enumerate(dict.fromkeys(item.path for item in items))}
    items.sort(key=lambda item: (files[item.path], item.stash[OPTIMIZED]))


def is_marked(item: pytest.Item, name: str, case: int = 0) -> bool:
    """Whether case number `case` of a test has this mark: with `after=n`, the first n cases have not."""
    return any(case >= mark.kwargs.get("after", 0) for mark in item.iter_markers(name))


def outside_folder(variable: str, beside: str) -> Path:
    """The folder named by an environment variable, or one beside the repository; skips the test if neither exists.

    A variable that is set to a missing folder is an error instead of a skip: the tests were meant to run.
    """
    named = os.environ.get(variable)
    folder = Path(named) if named else ROOT.parent / beside
    if folder.is_dir():
        return folder
    if named:
        pytest.fail(f"{variable}: got {named!r}, expected a folder; unset it or point it at one")
    pytest.skip(f"no folder ../{beside} beside the repository and {variable} is not set")


# Most of a test's time is compilation, and XLA compiles faster without its optimizations. Tests that compare floats
# bit for bit, or within a few roundings, are marked `optimized` and compile as users do: all cases with --run-slow,
# otherwise the first of each test. All others check integers, structure, or what is done with numbers. (XLA in jax
# 0.10 can also do without its emitters of fused loops, a slower second compiler; later versions cannot. It then
# compiles faster in one piece than in pieces for 32 threads.)
DISABLED = "JAX_DISABLE_MOST_OPTIMIZATIONS"
UNFUSED = "xla_cpu_use_fusion_emitters"
PIECES = "xla_cpu_parallel_codegen_split_count"
options_of_jax = compiler.get_compile_options
compiles_optimized: bool | None = None  # before the first file of tests


def options_without_fusion(*args: Any, **kwargs: Any) -> Any:
    options = options_of_jax(*args, **kwargs)
    options.env_option_overrides = [*options.env_option_overrides, (UNFUSED, False), (PIECES, 1)]
    return options


def compile_optimized(optimized: bool) -> None:
    """Sets how programs are compiled from now on, in child processes too."""
    global compiles_optimized
    if compiles_optimized is optimized:
        return
    if compiles_optimized is not None:
        jax.clear_caches()  # programs compiled otherwise: results of the two may differ in the last bit
    compiles_optimized = optimized
    jax.config.update("jax_disable_most_optimizations", not optimized)
    os.environ[DISABLED] = str(int(not optimized))
    if jax.__version_info__ < (0, 11):
        compiler.get_compile_options = options_of_jax if optimized else options_without_fusion
        os.environ["XLA_FLAGS"] = XLA_FLAGS if optimized else f"{XLA_FLAGS} --{UNFUSED}=false --{PIECES}=1"


def pytest_runtest_setup(item: pytest.Item) -> None:
    compile_optimized(item.stash[OPTIMIZED])


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """What JAX keeps of the programs of a file is not walked in every later garbage collection."""
    if nextitem is None or nextitem.path != item.path:
        gc.collect()
        gc.freeze()


@pytest.fixture(scope="session")
def oracles() -> Path:
    """Reference vectors and tiny checkpoints computed by third-party code."""
    return outside_folder("BITNET_JAX_ORACLES", "shared/oracles")


@pytest.fixture(scope="session")
def data_root() -> Path:
    """Real text and images, too large for the repository."""
    return outside_folder("BITNET_JAX_DATA", "shared/data")


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the repository, for tests that read its files."""
    return ROOT
