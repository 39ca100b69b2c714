"""Compiles the Pallas kernels for TPUs and GPUs on a machine without them.

    python -m bitnet_kernels.ahead_of_time --chip v5e --chip v6e --json kernels.json     # needs libtpu
    python -m bitnet_kernels.ahead_of_time --chip h200 --json kernels.json               # needs jax[cuda], no driver

`make tpu-compile` and `make gpu-compile` run it in environments with the required packages. Successful compilation
shows that buffers fit in on-chip memory and values in registers; correctness and speed need a real chip.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bitnet_kernels import pallas_gpu, pallas_tpu
from bitnet_kernels.machine import provenance
from bitnet_kernels.packed import FORMATS, PackedArray, codes_shape
from bitnet_kernels.shapes import MATRICES

TPU_TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "v7x": "tpu7x:2x2x1"}
# Target description, which XLA would otherwise query from the GPU.
GPU_DESCRIPTIONS = {
    "h200": """
        gpu_device_info {
          cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
          core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
          threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
          block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
          registers_per_core_limit: 65536 registers_per_block_limit: 65536
          shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
          l2_cache_size: 52428800 memory_bandwidth: 4800000000000 device_memory_size: 150000000000
        }
        platform_name: "CUDA" runtime_version { major: 13 } dnn_version_info { major: 9 minor: 10 }
        device_description_str: "NVIDIA H200"
    """
}
ROWS = (1, 16, 512)  # decode, batched decode, prefill
WIDE = ((28672, 8192), (8192, 28672))  # gate and down of a 70B model
GROUP_SIZES = (32, 64, 128)

Row = dict[str, Any]


def device(chip: str) -> jax.Device:
    """The device to compile for. Raises RuntimeError if its compiler is not installed."""
    if chip in TPU_TOPOLOGIES:
        # Otherwise libtpu spends a long time looking for a TPU host.
        os.environ |= {
            "TPU_SKIP_MDS_QUERY": "1",
            "TPU_ACCELERATOR_TYPE": "v5litepod-4",
            "TPU_WORKER_HOSTNAMES": "localhost",
        }
        arguments: dict[str, Any] = {"platform": "tpu", "topology_name": TPU_TOPOLOGIES[chip]}
    else:
        os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"  # compiling needs no driver
        arguments = {"platform": "cuda", "topology_name": chip, "topology": "1x1x1"}
        arguments["target_config"] = GPU_DESCRIPTIONS[chip]
    try:
        return topologies.get_topology_desc(**arguments).devices[0]
    except Exception as error:
        package = "libtpu" if chip in TPU_TOPOLOGIES else "jax-cuda13-plugin and jax-cuda13-pjrt"
        raise RuntimeError(f"cannot compile for {chip}: install {package} of this jax ({error})") from error


def compile_kernels(chip: str) -> list[Row]:
    """One row per format and shape: compile seconds and memory in bytes, or the compiler error."""
    target = device(chip)
    backend = pallas_tpu if chip in TPU_TOPOLOGIES else pallas_gpu
    formats = [name for name, form in FORMATS.items() if backend.LAYOUT in form.layouts]
    shapes = [(m, n, k, 1) for m, (n, k) in itertools.product(ROWS, MATRICES + WIDE)]
    if backend is pallas_tpu:
        shapes += [(256, 2560, 2560, 2560 // size) for size in GROUP_SIZES]
    multiply = backend.scaled_matmul
    if backend is pallas_tpu:
        multiply = functools.partial(multiply, device_kind=target.device_kind)
    return [_compile(chip, target, multiply, backend.LAYOUT, f, *shape) for f in formats for shape in shapes]


def _compile(
    chip: str,
    target: jax.Device,
    multiply: Any,
    layout: str,
    format: str,
    m: int,
    n: int,
    k: int,
    groups: int,
) -> Row:
    codes: Any = jax.ShapeDtypeStruct(codes_shape(format, (n, k), groups, layout), jnp.uint8)
    scale: Any = jax.ShapeDtypeStruct((n, groups), jnp.float32)
    w = PackedArray(codes, scale, format, layout, (n, k))
    sharding = NamedSharding(Mesh(np.array([target]), ("x",)), PartitionSpec())
    function = jax.jit(multiply, in_shardings=sharding, out_shardings=sharding)
    row: Row = {"chip": chip, "device_kind": target.device_kind, "format": format}
    row |= {"m": m, "n": n, "k": k, "groups": groups}
    start = time.monotonic()
    try:
        with tempfile.TemporaryDirectory() as folder:
            os.environ |= {"MOSAIC_GPU_DUMP_PTXAS": "1", "MOSAIC_GPU_DUMP_TO": folder}
            lowered = function.trace(jax.ShapeDtypeStruct((m, k), jnp.int8), w).lower(
                lowering_platforms=("tpu" if chip in TPU_TOPOLOGIES else "cuda",)
            )
            memory = lowered.compile().memory_analysis()
            reports = [file.read_text() for file in Path(folder).glob("*.ptxas")]
    except Exception as error:  # a failure is a result
        return row | {"compiled": False, "error": str(error)[:500]}
    row |= {"compiled": True, "seconds": round(time.monotonic() - start, 2)}
    row |= {"temporary_bytes": memory.temp_size_in_bytes, "code_bytes": memory.generated_code_size_in_bytes}
    report = "\n".join(reports)  # from ptxas, for GPUs
    if registers := re.findall(r"Used (\d+) registers", report):
        row["registers"] = max(map(int, registers))
        row["spilled_bytes"] = sum(map(int, re.findall(r"(\d+) bytes spill", report)))
    return row


def table(rows: Sequence[Row]) -> str:
    """Markdown table with a row per chip and format; registers per thread and spilled bytes for GPU kernels only."""
    lines = ["| chip | format | compiled | seconds each | most temporary MB | registers | spilled bytes |"]
    lines.append("|---|---|--:|--:|--:|--:|--:|")
    for (chip, format), group in itertools.groupby(rows, lambda row: (row["chip"], row["format"])):
        attempts = list(group)
        compiled = [row for row in attempts if row["compiled"]]
        seconds = sum(row["seconds"] for row in compiled) / max(1, len(compiled))
        megabytes = max((row["temporary_bytes"] for row in compiled), default=0) / 1e6
        registers = max((row.get("registers", 0) for row in compiled), default=0)
        spilled = sum(row.get("spilled_bytes", 0) for row in compiled)
        lines.append(
            f"| {chip} | {format} | {len(compiled)} of {len(attempts)} | {seconds:.1f} | {megabytes:.1f} "
            f"| {f'{registers} | {spilled}' if registers else ' | '} |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    chips = sorted(TPU_TOPOLOGIES | GPU_DESCRIPTIONS)
    parser.add_argument("--chip", choices=chips, action="append", required=True, help="may be repeated")
    parser.add_argument("--json", type=Path, help="output file for provenance and rows")
    options = parser.parse_args(arguments)
    jax.config.update("jax_platforms", "cpu")
    rows: list[Row] = []
    for chip in options.chip:
        more = compile_kernels(chip)
        rows += more
        failed = [row for row in more if not row["compiled"]]
        print(f"{chip}: {len(more) - len(failed)} of {len(more)} kernels compiled", flush=True)
        for row in failed:
            print(
                f"  {row['format']} m={row['m']} n={row['n']} k={row['k']} G={row['groups']}: {row['error']}"
            )
    print(table(rows))
    if options.json:
        origin = {name: value for name, value in provenance().items() if name in ("commit", "jax")}
        lines = ",\n".join(json.dumps(row) for row in rows)
        options.json.write_text(f'{{"provenance": {json.dumps(origin)}, "rows": [\n{lines}\n]}}\n')
    if not all(row["compiled"] for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
