"""The training speed of this package beside plain JAX and PyTorch: the same shapes, in turn, each in its own process.

    python -m experiments.training_cost --compare torch --sizes 1m,5m,20m --json training.json

`worker` is what runs in the processes of this package and of plain JAX; training_torch.py in those of PyTorch. A
process waits while another one trains, so that no two compete for the processors.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from bitnet_experiments.provenance import provenance
from bitnet_jax.models import ModelConfig, Transformer
from bitnet_jax.progress import progress_bar
from bitnet_jax.tools.machine import kernel_threads
from bitnet_jax.training.allocator import keep_freed_memory
from bitnet_jax.training.flops import training_flops_per_token
from bitnet_jax.training.hardware import peak_flops, peak_memory
from bitnet_jax.training.optimizers import OptimizerConfig, make_optimizer
from bitnet_jax.training.state import TrainState
from bitnet_jax.training.step import make_train_step
from bitnet_jax.training.task import init_variables, language_loss
from experiments import training_plain_jax

TURN_SECONDS = 1.5  # of a process, about; the threads of PyTorch spin for 0.2 s when they are done
QUIET_SECONDS = 0.3


class Size(NamedTuple):
    hidden: int
    ffn: int
    layers: int
    heads: int
    batch: int = 8
    length: int = 256


SIZES = {
    "100k": Size(64, 192, 2, 4),
    "1m": Size(128, 384, 5, 4),
    "5m": Size(256, 768, 6, 4),
    "20m": Size(512, 1536, 6, 8),
    "1m-long": Size(
        128, 384, 5, 4, batch=16, length=1024
    ),  # for the memory: many tokens, whole scores of attention
}
RECIPES = {"float32": "float32", "ternary": "bitnet_b158"}
OURS = {f"bitnet_jax {recipe}": ("ours", recipe) for recipe in RECIPES}
KEPT = {f"bitnet_jax {recipe}, memory kept": ("ours_kept", recipe) for recipe in RECIPES}
PLAIN_JAX = {"plain JAX float32": ("plain_jax", "float32")}
TORCH = {f"PyTorch {recipe}": ("torch", recipe) for recipe in RECIPES}
COMPILED = {f"PyTorch compiled {recipe}": ("torch_compiled", recipe) for recipe in RECIPES}


def compare(size: Size, variants: Mapping[str, tuple[str, str]], rounds: int, python: str) -> dict[str, Any]:
    """Tokens per second as medians with ranges over rounds, and the highest float32 peak.

    Args:
      variants: name -> (who trains, recipe), see `worker` and training_torch.py.
      python: the interpreter that has torch.

    Raises:
      RuntimeError: a process ended, with the end of what it said.
    """
    tokens = size.batch * size.length
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    memory: dict[str, int] = {}
    peaks: list[float] = []  # of every round: the clock of a shared machine changes
    with ExitStack() as stack:
        processes: dict[str, _Process] = {}
        for name, (who, recipe) in variants.items():
            command = _command(who, recipe, size, python)
            processes[name] = stack.enter_context(_Process(name, command))
        steps = {
            name: max(1, round(TURN_SECONDS / process.run(1)["seconds"]))
            for name, process in processes.items()
        }
        with progress_bar(rounds * len(variants), unit="turn", description="training in turn") as bar:
            for _ in range(rounds):
                peaks += filter(None, [peak_flops(jax.devices("cpu")).flops])
                for name, process in processes.items():
                    answer = process.run(steps[name])
                    seconds[name].append(answer["seconds"] / steps[name])
                    memory[name] = answer["peak_bytes"]
                    time.sleep(QUIET_SECONDS)
                    bar.update()
        ready = {name: process.ready for name, process in processes.items()}
    return {
        "size": size._asdict(),
        "parameters": {name: about["parameters"] for name, about in ready.items()},
        "versions": {name: about["version"] for name, about in ready.items()},
        "tokens_per_second": {
            name: _spread([tokens / took for took in values]) for name, values in seconds.items()
        },
        "peak_resident_bytes": memory,
        "float_peak_gflops": 1e-9 * max(peaks) if peaks else None,
    }


def with_mfu(figures: Mapping[str, Any]) -> dict[str, Any]:
    """The figures with `mfu` for every size: the share of the highest peak that was measured at any.

    A peak is a limit: a lower one, while another process had a core or the clock was low, limits nothing.
    """
    peaks = [found["float_peak_gflops"] for found in figures["sizes"].values()]
    sizes = {}
    for name, found in figures["sizes"].items():
        size = Size(**found["size"])
        flops = training_flops_per_token(_model(size, "float32"), size.length)
        speeds = found["tokens_per_second"]
        mfu = None
        if None not in peaks:
            mfu = {who: 1e-9 * flops * speed["median"] / max(peaks) for who, speed in speeds.items()}
        sizes[name] = found | {"mfu": mfu}
    return {**figures, "sizes": sizes}


def side_by_side(sizes: list[str], rounds: int, python: str | None, json_file: Path | None) -> dict[str, Any]:
    """Compares at each size and writes what is known after each."""
    variants = OURS | KEPT | PLAIN_JAX | (TORCH | COMPILED if python else {})
    figures: dict[str, Any] = {
        "rounds": rounds,
        "threads": kernel_threads(),
        "sizes": {},
        "provenance": provenance(),
    }
    for name in sizes:
        figures["sizes"][name] = compare(SIZES[name], variants, rounds, python or sys.executable)
        figures = with_mfu(figures)
        if json_file is not None:
            json_file.write_text(json.dumps(figures, indent=1) + "\n")
        print(table(name, figures["sizes"][name]), flush=True)
    return figures


def table(name: str, figures: Mapping[str, Any]) -> str:
    lines = [f"{name}: {figures['size']['batch']} x {figures['size']['length']} tokens per step"]
    for who, speed in figures["tokens_per_second"].items():
        share = f", {100 * figures['mfu'][who]:.0f} % of the float32 peak" if figures.get("mfu") else ""
        spread = f"[{speed['lowest']:.0f}, {speed['highest']:.0f}]"
        memory = f"{figures['peak_resident_bytes'][who] / 1e6:.0f} MB"
        lines.append(f"  {who:32s} {speed['median']:8.0f} tokens/s {spread}{share}, {memory}")
    return "\n".join(lines)


def markdown(figures: Mapping[str, Any]) -> str:
    """A table of all sizes: thousands of tokens a second with the range over rounds, share of the peak, memory."""
    sizes = figures["sizes"]
    lines = [
        "| | " + " | ".join(f"{name}, tokens/s | peak | MB" for name in sizes) + " |",
        "|---|" + "--:|--:|--:|" * len(sizes),
    ]
    for who in next(iter(sizes.values()))["tokens_per_second"]:
        cells = []
        for of_size in sizes.values():
            speed, share = of_size["tokens_per_second"][who], of_size["mfu"] and of_size["mfu"][who]
            cells += [
                f"{speed['median']:.0f} [{speed['lowest']:.0f}, {speed['highest']:.0f}]",
                "-" if share is None else f"{share:.2f}",
                f"{of_size['peak_resident_bytes'][who] / 1e6:.0f}",
            ]
        lines.append(f"| {who} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def worker(who: str, recipe: str, size: Size) -> None:
    """Trains as many steps as each line of standard input says; prints one line of JSON when ready and after each."""
    if who == "ours_kept":
        keep_freed_memory()
    step, parameters = _plain_jax(size) if who == "plain_jax" else _ours(size, recipe)
    for _ in range(2):
        jax.block_until_ready(step())
    print(json.dumps({"parameters": parameters, "version": jax.__version__}), flush=True)
    for line in sys.stdin:
        began = time.perf_counter()
        for _ in range(int(line)):
            loss = jax.block_until_ready(step())
        took = time.perf_counter() - began
        print(
            json.dumps({"seconds": took, "loss": float(loss), "peak_bytes": peak_memory([])["resident"]}),
            flush=True,
        )


def _model(size: Size, recipe: str) -> ModelConfig:
    return ModelConfig(
        vocab_size=training_plain_jax.VOCABULARY,
        hidden_size=size.hidden,
        ffn_size=size.ffn,
        num_layers=size.layers,
        num_heads=size.heads,
        max_length=size.length,
        mlp="silu_glu",
        norm_placement="pre",
        tie_embeddings=True,
        precision=RECIPES[recipe],
    )


def _ours(size: Size, recipe: str) -> tuple[Callable[[], jax.Array], int]:
    """The training step of this package, without statistics of the codes, which nobody else measures."""
    config = _model(size, recipe)
    optimizer = make_optimizer(OptimizerConfig(schedule="constant"), total_steps=1)
    update = make_train_step(
        language_loss(Transformer(config)), optimizer, total_steps=1000, statistics_every=0
    )
    state = TrainState.create(jax.jit(init_variables, static_argnums=0)(config, jax.random.key(0)), optimizer)
    parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state.params))
    shape = size.batch, size.length + 1
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, shape).astype(np.int32)
    batch, key, states = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}, jax.random.key(1), [state]

    def step() -> jax.Array:
        states[0], metrics = update(states[0], batch, key)
        return metrics["loss"]

    return step, parameters


def _plain_jax(size: Size) -> tuple[Callable[[], jax.Array], int]:
    shapes = jax.eval_shape(lambda: training_plain_jax.init(size.hidden, size.ffn, size.layers))
    parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
    return training_plain_jax.make_step(*size), parameters


class _Process:
    """A process that trains when it is told to."""

    def __init__(self, name: str, command: list[str]) -> None:
        self.name = name
        self.said = tempfile.TemporaryFile("w+")  # noqa: SIM115  # closed with the process; a pipe would fill up
        self.process = subprocess.Popen(
            command,
            cwd=Path(__file__).parents[1],
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.said,
        )
        try:
            self.ready = self._answer()
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self) -> _Process:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.communicate()
        self.said.close()

    def run(self, steps: int) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            self.said.seek(0)
            said = self.said.read().strip().splitlines()
            raise RuntimeError(f"{self.name}: the process ended: {said[-1] if said else 'it said nothing'}")
        answer: dict[str, Any] = json.loads(line)
        return answer


def _command(who: str, recipe: str, size: Size, python: str) -> list[str]:
    if who.startswith("torch"):
        command = [python, str(Path(__file__).parent / "training_torch.py"), "--recipe", recipe]
        command += ["--compile"] if who == "torch_compiled" else []
        return command + [
            word for name, value in size._asdict().items() for word in (f"--{name}", str(value))
        ]
    call = f"training_side_by_side.worker({who!r}, {recipe!r}, training_side_by_side.Size(*{tuple(size)}))"
    return [sys.executable, "-c", f"from experiments import training_side_by_side; {call}"]


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": float(np.median(values)), "lowest": min(values), "highest": max(values)}
