"""Compiled programs are kept in the user's cache folder, found again, and bounded."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bitnet_jax.inference import startup

PROGRAM = """
from bitnet_jax.inference.startup import use_compilation_cache
use_compilation_cache()
import jax
events = []
jax.monitoring.register_event_listener(lambda name, **_: events.append(name))
assert float(jax.jit(lambda x: x * 3 + 1)(2.0)) == 7
print(events.count("/jax/compilation_cache/cache_hits"), jax.config.jax_compilation_cache_dir)
"""


def run(folder: Path | str) -> list[str]:
    environment = {**os.environ, "BITNET_JAX_CACHE": str(folder)}
    del environment["JAX_COMPILATION_CACHE_DIR"]  # that of the tests
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout.split()


@pytest.mark.slow
def test_a_second_process_finds_the_programs_of_the_first(tmp_path: Path) -> None:
    hits, where = run(tmp_path)
    assert hits == "0"
    assert Path(where).parent == tmp_path / "programs"
    assert startup.processor() in where
    assert list(Path(where).iterdir())
    again, same = run(tmp_path)
    assert int(again) > 0
    assert same == where
    for file in Path(where).iterdir():
        file.write_bytes(b"damaged")
    assert run(tmp_path) == ["0", where]  # compiled again
    assert run("off") == ["0", "None"]


def test_nothing_is_set_once_jax_is_imported_or_the_user_has_chosen(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("BITNET_JAX_CACHE", str(tmp_path))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    startup.use_compilation_cache()
    assert "JAX_COMPILATION_CACHE_DIR" not in os.environ  # this process has imported jax
    monkeypatch.delitem(sys.modules, "jax")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "elsewhere")
    startup.use_compilation_cache()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == "elsewhere"


def test_the_oldest_programs_are_removed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for age, name in enumerate(("new", "middle", "old")):
        file = tmp_path / "programs" / "version" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(bytes(100))
        os.utime(file, (1000 - age, 1000 - age))
    monkeypatch.setenv("BITNET_JAX_CACHE", str(tmp_path))
    monkeypatch.delitem(sys.modules, "jax")
    for name in ("JAX_COMPILATION_CACHE_DIR", *startup.SETTINGS):
        monkeypatch.setenv(name, "")  # restored afterwards
        monkeypatch.delenv(name)
    monkeypatch.setattr(startup, "MAX_BYTES", 250)
    startup.use_compilation_cache()
    assert {file.name for file in tmp_path.rglob("*") if file.is_file()} == {"new", "middle"}
