"""Ahead-of-time compilation for TPUs: a sharded training step and a sharded decode step, for 64 chips each.

    make tpu-compile                                          an environment with libtpu, then all cases (30 minutes)
    python -m experiments.tpu_compile --only train-v5p decode-v5p      repeat these; requires libtpu
    python -m experiments.tpu_compile --report                only the table, from results.json

XLA's TPU compiler is the library libtpu and needs no chip. It shows that the program compiles, the memory per device
(an out-of-memory error is also a result), and the collectives that the partitioner inserted. It does not show whether
the program is correct or how fast it is.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import mesh_utils, topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from bitnet_experiments.provenance import provenance
from bitnet_jax.inference.cache import init_cache
from bitnet_jax.models import PRESETS, ModelConfig, Transformer
from bitnet_jax.models.stacked import equal_layers, stack
from bitnet_jax.nn.placement import AXES, DATA, TENSOR
from bitnet_jax.packed import packing
from bitnet_jax.training.collectives import collectives, totals
from bitnet_jax.training.optimizers import OptimizerConfig, make_optimizer
from bitnet_jax.training.sharding import (
    MeshConfig,
    batch_sharding,
    partition_spec,
    state_shardings,
    with_shardings,
)
from bitnet_jax.training.state import TrainState
from bitnet_jax.training.step import make_train_step
from bitnet_jax.training.task import MOST_LOGITS, init_variables, language_loss

STUDY = Path(__file__).parent / "studies" / "tpu_compile"
RESULTS = STUDY / "results.json"
MARKS = ("<!-- table:begin -->", "<!-- table:end -->")

# Otherwise libtpu searches for a TPU host, which takes seconds and prints warnings, and allows one process at a time.
TOPOLOGY_ALONE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
# XLA's optimization effort, from -1 to 1. The default 0 takes several times as long for layers that are not scanned.
EFFORT = -1.0
STEPS = 1000  # of the learning rate schedule

Program = tuple[Callable[..., Any], tuple[Any, ...]]  # a jitted function and its arguments as shapes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A program to compile and its target; `length` is that of a sequence, or of the cache."""

    what: str
    chips: str  # a topology name of libtpu
    mesh: MeshConfig
    batch: int
    length: int = 2048
    preset: str = "7b"
    layers: int | None = None  # None: as in the preset
    recipe: str = "bitnet_b158"
    scan: bool = True  # train: over the layers
    remat: bool | str = True
    product: str = "float"

    def model(self) -> ModelConfig:
        preset = PRESETS[self.preset]
        return dataclasses.replace(
            preset,
            num_layers=self.layers or preset.num_layers,
            max_length=self.length,
            precision=self.recipe,
            dtype="bfloat16",
            product=self.product,
            remat=self.remat,
        )


CASES = {
    "train-v5p": Case(what="train", chips="v5p:4x4x4", mesh=MeshConfig(fsdp=16, tensor=4), batch=256),
    "train-v6e": Case(what="train", chips="v6e:8x8", mesh=MeshConfig(fsdp=8, tensor=8), batch=128),
    "decode-v5p": Case(what="decode", chips="v5p:4x4x4", mesh=MeshConfig(data=4, tensor=16), batch=64),
    "decode-v6e": Case(what="decode", chips="v6e:8x8", mesh=MeshConfig(data=4, tensor=16), batch=64),
}


def compile_for_tpus() -> None:
    """Sets this process up: no search for a TPU, low effort, and the loss in pieces as on a TPU."""
    os.environ.update(TOPOLOGY_ALONE)
    jax.config.update("jax_platforms", "cpu")  # otherwise JAX with libtpu would try to initialize a TPU
    jax.config.update("jax_exec_time_optimization_effort", EFFORT)
    MOST_LOGITS["cpu"] = MOST_LOGITS["other"]


def devices_of(chips: str) -> Sequence[Any]:
    return topologies.get_topology_desc(platform="tpu", topology_name=chips).devices


def mesh_of(chips: str, sizes: MeshConfig) -> Mesh:
    """A mesh over all chips of a topology; mesh neighbors are torus neighbors where possible."""
    devices = mesh_utils.create_device_mesh(
        dataclasses.astuple(sizes), devices_of(chips), allow_split_physical_axes=True
    )
    return Mesh(devices, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def training_step(case: Case, mesh: Mesh) -> Program:
    """One training update, as in `bitnet_jax.training.loop`."""
    config, optimizer = case.model(), make_optimizer(OptimizerConfig(), STEPS)

    def create(key: jax.Array) -> TrainState:
        variables = init_variables(config, key)
        return TrainState.create(
            stack(variables, equal_layers(config)) if case.scan else variables, optimizer
        )

    key = jax.eval_shape(lambda: jax.random.key(0))
    shapes = jax.eval_shape(create, key)
    shardings = state_shardings(mesh, shapes)
    tokens = jax.ShapeDtypeStruct((case.batch, case.length), jnp.int32, sharding=batch_sharding(mesh))
    step = make_train_step(
        language_loss(Transformer(config)),
        optimizer,
        total_steps=STEPS,
        precisions=config.precisions(),
        shardings=shardings,
    )
    everywhere = NamedSharding(mesh, PartitionSpec())
    return step, (
        with_shardings(shapes, shardings),
        {"inputs": tokens, "targets": tokens},
        with_shardings(key, everywhere),
    )


def decode_step(case: Case, mesh: Mesh) -> Program:
    """One greedy decode step with packed weights and a bfloat16 cache of case.length positions."""
    config = case.model()

    def sharding(path: Any, leaf: Any) -> NamedSharding:
        # Codes are an array [panels of outputs, blocks of inputs, bytes], sharded like the matrix.
        *parents, last = (
            str(part) for part in jax.tree_util.keystr(path, simple=True, separator="/").split("/")
        )
        if last in ("codes", "scale") and parents[0] == "packed":
            split = partition_spec("/".join(parents), leaf.shape[:2], mesh.shape)
        else:
            split = partition_spec("/".join((*parents, last)), leaf.shape, mesh.shape)
        return NamedSharding(mesh, split)

    variables = packing.abstract(config)
    variables = with_shardings(variables, jax.tree_util.tree_map_with_path(sharding, variables))
    cache = jax.eval_shape(lambda: init_cache(config, case.batch, case.length, "bfloat16"))

    def of_cache(leaf: Any) -> NamedSharding:
        spec = {0: (), 2: (DATA,), 4: (DATA, None, TENSOR)}[len(leaf.shape)]  # [], [B, S], [B, S, K, h]
        return NamedSharding(mesh, PartitionSpec(*spec))

    placed = jax.tree.map(of_cache, cache)
    cache = with_shardings(cache, placed)

    def step(variables: Any, tokens: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
        output: Any = Transformer(config).apply(variables, tokens, cache=cache)
        return jnp.argmax(output.logits, axis=-1).astype(jnp.int32), output.cache

    tokens = jax.ShapeDtypeStruct((case.batch, 1), jnp.int32, sharding=batch_sharding(mesh))
    jitted = jax.jit(step, donate_argnums=2, out_shardings=(batch_sharding(mesh), placed))
    return jitted, (variables, tokens, cache)


PROGRAMS: dict[str, Callable[[Case, Mesh], Program]] = {"train": training_step, "decode": decode_step}


def compiled(program: Program) -> dict[str, Any]:
    """Compiles for TPUs: status ("compiled", "out of memory" or "refused"), seconds, memory and collectives."""
    function, arguments = program
    began = time.perf_counter()
    lowered = function.trace(*arguments).lower(lowering_platforms=("tpu",))  # type: ignore[attr-defined]
    row: dict[str, Any] = {"lower_seconds": round(time.perf_counter() - began, 1)}
    began = time.perf_counter()
    try:
        executable = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        full = "RESOURCE_EXHAUSTED" in str(error)
        row |= {
            "status": "out of memory" if full else "refused",
            "message": " ".join(str(error).split())[:600],
        }
    else:
        row["status"] = "compiled"
        memory = executable.memory_analysis()
        row["bytes_per_device"] = {
            "arguments": memory.argument_size_in_bytes,
            "outputs_not_aliased": memory.output_size_in_bytes - memory.alias_size_in_bytes,
            "temporaries": memory.temp_size_in_bytes,
            "code": memory.generated_code_size_in_bytes,
            "peak": memory.peak_memory_in_bytes,
        }
        row["collectives"] = totals(collectives(executable.as_text()))
    row["compile_seconds"] = round(time.perf_counter() - began, 1)
    return row


def compile_case(case: Case) -> dict[str, Any]:
    mesh = mesh_of(case.chips, case.mesh)
    with jax.set_mesh(mesh):
        row = compiled(PROGRAMS[case.what](case, mesh))
    return dataclasses.asdict(case) | {"layers": case.model().num_layers, "effort": EFFORT} | row | versions()


def versions() -> dict[str, Any]:
    return {"provenance": provenance() | {"libtpu": importlib.metadata.version("libtpu")}}


def table(results: dict[str, dict[str, Any]]) -> str:
    """The results as a Markdown table; sizes in GiB per device."""
    lines = [
        "| case | mesh | layers | batch x length | result | arguments | temporaries | peak | collectives | compile s |",
        "|---|---|--:|--:|---|--:|--:|--:|---|--:|",
    ]
    for name, row in results.items():
        axes = " x ".join(f"{axis} {size}" for axis, size in row["mesh"].items() if size > 1)
        memory = row.get("bytes_per_device", {})
        parts = ("arguments", "temporaries", "peak")
        sizes = [f"{memory[part] / 2**30:.2f}" if part in memory else "-" for part in parts]
        counts = ", ".join(
            f"{sum(entry['count'] for entry in kinds.values()):,} {operation} ({'/'.join(sorted(kinds))})"
            for operation, kinds in sorted(row.get("collectives", {}).items())
        )
        cells = (name, axes, row["layers"], f"{row['batch']} x {row['length']}", row["status"], *sizes, counts or "-",
                 row["compile_seconds"])  # fmt: skip
        lines.append(f"| {' | '.join(map(str, cells))} |")
    made_by = {
        "commit {commit}, jax {jax}, libtpu {libtpu}".format(**row["provenance"]) for row in results.values()
    }
    return "\n".join([*lines, "", f"Generated at {'; '.join(sorted(made_by))}."])


def report(results: dict[str, dict[str, Any]]) -> None:
    """Writes the table between the markers of the study's README."""
    readme = STUDY / "README.md"
    before, _, rest = readme.read_text().partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    readme.write_text(f"{before}{MARKS[0]}\n{table(results)}\n{MARKS[1]}{after}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), help="compile these")
    parser.add_argument("--report", action="store_true", help="compile nothing")
    options = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if not options.report:
        compile_for_tpus()
        for name in options.only:
            results[name] = compile_case(CASES[name])
            print(f"{name}: {results[name]['status']} in {results[name]['compile_seconds']} s", flush=True)
            results = {name: results[name] for name in CASES if name in results}
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    report(results)


if __name__ == "__main__":
    main()
