"""Runs `bitnet-jax` like a user: in separate processes, on a run that takes seconds."""

from __future__ import annotations

import os
import subprocess
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from bitnet_jax.training.load import read_run

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 300  # a process that takes longer is considered hung
# Background jobs of a shell ignore Ctrl-C, and so do their children.
CTRL_C = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
PROGRAM = "from bitnet_jax.cli.main import console; console()"

SETTINGS = {
    "data.split": "tail", "data.valid_fraction": 0.2, "data.length": 16, "data.batch_size": 2, "model.hidden_size": 16,
    "model.ffn_size": 32, "model.num_layers": 1, "model.max_length": 64, "training.steps": 12,
    "training.checkpoint_every": 4, "training.eval_every": 6, "training.log_every": 1, "evaluation.batches": 1,
}  # fmt: skip


def training(place: Path, name: str, **others: object) -> list[str]:
    """Arguments of `bitnet-jax` that train the tiny run `place / name`."""
    text = place / "text.txt"
    if not text.exists():
        text.write_text("A tiny text about quantized numbers. " * 100)
    settings = (
        SETTINGS | {"data.source": text} | {key.replace("__", "."): value for key, value in others.items()}
    )
    overrides = [f"--config.{key}={value}" for key, value in settings.items()]
    return ["train", "--config", "byte_lm:small", "--workdir", str(place / name), "--quiet", *overrides]


def environment(place: Path) -> dict[str, str]:
    """Uses the sources of this checkout; compiled programs are cached below `place`, so that each is compiled once."""
    sources = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "experiments")]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(sources),
        "BITNET_JAX_CACHE": str(place / "cache"),
        "JAX_COMPILATION_CACHE_DIR": str(place / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


def start(
    arguments: Sequence[str], env: dict[str, str], *, prelude: str = "", program: str = PROGRAM,
    before: Sequence[str] = (),
) -> subprocess.Popen[str]:  # fmt: skip
    """A process with the default SIGINT handler, whatever this one inherited; it runs `prelude` (Python) first."""
    return subprocess.Popen(
        [*before, sys.executable, "-c", f"{CTRL_C}\n{prelude}\n{program}", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=env,
    )


def end(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """(exit code, stdout, stderr). Raises AssertionError if the process hangs."""
    try:
        out, error = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise AssertionError(f"{process.args} hangs") from None
    return process.returncode, out, error


def run(
    arguments: Sequence[str], env: dict[str, str], *, prelude: str = "", before: Sequence[str] = ()
) -> str:
    """stdout of a command that must succeed."""
    code, out, error = end(start(arguments, env, prelude=prelude, before=before))
    assert code == 0, f"{' '.join(arguments)}: exit {code}: {error[-1000:]}"
    return out


def one_line_error(code: int, error: str) -> bool:
    """Whether invalid input was reported as documented: exit code 2 and one line."""
    return code == 2 and error.count("\n") == 1 and error.startswith("error: ")


def weights(run_folder: Path) -> int:
    """CRC-32 of the newest weights of a run."""
    crc = 0
    for path, leaf in sorted(
        (jax.tree_util.keystr(path), np.asarray(leaf))
        for path, leaf in jax.tree_util.tree_leaves_with_path(read_run(run_folder).variables)
    ):
        crc = zlib.crc32(path.encode() + leaf.tobytes(), crc)
    return crc
