"""The cost of a model: computed operations, joules and bytes, and joules measured by the machine's meters.

    print(table(energy_figures(PRESETS["2b4t"], length=512)))

Computed by evaluation/energy.py, measured by evaluation/meters.py.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from bitnet_jax.evaluation.energy import (
    BITS_PER_WEIGHT,
    HEADS,
    PICOJOULES,
    Operations,
    Zeros,
    activated_parameters,
    ideal_bits,
    joules,
    operations,
    without_quantization,
)
from bitnet_jax.evaluation.meters import measure, open_meters
from bitnet_jax.inference.cache import kv_bytes
from bitnet_jax.inference.generation import generate
from bitnet_jax.models import ModelConfig
from bitnet_jax.packed import packing
from bitnet_jax.packed.storage import load_packed
from bitnet_jax.tools.model_bench import model_folder, preset_config

# Duration of a measurement: long compared with the milliseconds between counter updates.
IDLE_SECONDS, WORK_SECONDS = 3.0, 10.0


def chosen_config(
    preset: str | None, file: str | None, recipe: str | None, head: str | None, ternary_format: str | None
) -> ModelConfig:
    """The config of a preset, or of the `model` section of a run's config file.

    Raises:
      ValueError: neither or both, a preset option with a config file, or no vocabulary size.
    """
    if (preset is None) == (file is None):
        raise ValueError("expected one of FOLDER, --preset NAME and --config NAME or FILE.py")
    if preset is not None:
        return preset_config(preset, recipe, head, ternary_format)
    if recipe or head or ternary_format:
        raise ValueError(
            "got --recipe, --head or --ternary-format with --config; set them in the config file"
        )
    from bitnet_jax.training.config import RunConfig
    from bitnet_jax.training.config_file import load_config_file  # flag parsing, not needed for presets

    run = RunConfig.from_dict(load_config_file(str(file)))
    if "vocab_size" not in run.model and run.data.tokenizer != "byte":
        raise ValueError(
            f"got {file} without model.vocab_size and with tokenizer {run.data.tokenizer!r}, whose size is unknown; "
            "set model.vocab_size"
        )
    return run.model_config(run.model.get("vocab_size", 256))


def energy_figures(
    config: ModelConfig,
    *,
    length: int = 512,
    floats: str = "float16",
    kv_format: str | None = None,
    zeros: Zeros | None = None,
) -> dict[str, Any]:
    """The computed figures of a model of this shape for a text of `length` tokens.

    Raises:
      ValueError: see `evaluation.energy.operations`.
    """
    rows = operations(config, length, floats=floats, zeros=zeros)
    baseline = operations(without_quantization(config), length, floats=floats)
    activated = activated_parameters(config, zeros or {})
    generates = config.causal and not config.num_classes
    weights = _bytes_by_format(config)
    return {
        "length": length,
        "floats": floats,
        "operations": [dataclasses.asdict(row) for row in rows],
        "joules": {process: _joules(rows, baseline, length, process) for process in PICOJOULES},
        "linear_parameters": activated.parameters,
        "activated_parameters": activated.activated,
        "bytes": {
            "weights": weights,
            "weights_total": sum(weights.values()),
            "kv_cache": kv_bytes(config, length, kv_format) if generates else 0,
            "kv_format": kv_format or config.dtype,
            "linear_at_their_information": ideal_bits(config, other_bits=0) / 8,
            "linear_in_float16": ideal_bits(config, linear_bits=16, other_bits=0) / 8,
            "linear_packed_as": {
                name: activated.parameters * bits / 8 for name, bits in BITS_PER_WEIGHT.items()
            },
        },
        "config": config.to_dict(),
    }


def _joules(
    rows: Sequence[Operations], baseline: Sequence[Operations], length: int, process: str
) -> dict[str, Any]:
    energy, floats = joules(rows, process), joules(baseline, process)
    with_head = joules(rows, process, head=True)
    parts = dict.fromkeys(row.part for row in rows)
    return {
        "add": energy.add,
        "multiply": energy.multiply,
        "total": energy.total,
        "total_with_head": with_head.total,
        "per_token": energy.total / length,
        "per_token_with_head": with_head.total / length,
        "by_part": {
            part: joules([row for row in rows if row.part == part], process, head=True).total
            for part in parts
        },
        "same_shape_in_floats": floats.total,
        "floats_over_this": floats.total / energy.total,
    }


def _bytes_by_format(config: ModelConfig) -> dict[str, int]:
    """Bytes of the packed model by part and format, such as "linear ternary2" or "embedding bfloat16"."""
    abstract, linear = packing.abstract(config), {f"{path}/weight" for path in config.linear_shapes()}
    sizes: dict[str, int] = {}

    def count(path: str, format: str, nbytes: int) -> None:
        is_table = path.startswith(("embed/", "position_embed/"))
        is_head = path.split("/")[0] in HEADS
        part = "embedding" if is_table else "head" if is_head else "linear" if path in linear else "other"
        sizes[f"{part} {format}"] = sizes.get(f"{part} {format}", 0) + nbytes

    for path, weight in flatten_dict(dict(abstract["packed"]), sep="/").items():
        count(path, weight.format, weight.nbytes)
    for path, leaf in flatten_dict(dict(abstract["params"]), sep="/").items():
        count(path, str(leaf.dtype), leaf.size * leaf.dtype.itemsize)
    return sizes


def measured_figures(
    config: ModelConfig, variables: Mapping[str, Any] | None, *, prompt: int = 16, new_tokens: int = 64
) -> dict[str, Any]:
    """Joules per generated token and idle power for every meter of the machine; or why there is no meter.

    Generation from a random prompt is repeated for WORK_SECONDS, after one call for compilation.

    Args:
      variables: None: random weights of this shape, written to a temporary folder.

    Raises:
      ValueError: prompt and tokens exceed the model's max_length.
    """
    meters, absent = open_meters()
    if not meters:
        return {"absent": absent}
    if variables is None:
        with model_folder(config, None) as folder:
            return measured_figures(
                config, load_packed(folder).variables, prompt=prompt, new_tokens=new_tokens
            )
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (1, prompt), np.int32)

    def once() -> None:
        jax.block_until_ready(generate(config, variables, tokens, max_new_tokens=new_tokens))

    repeats = 0

    def work() -> None:
        nonlocal repeats
        ends = time.perf_counter() + WORK_SECONDS
        while time.perf_counter() < ends:
            once()
            repeats += 1

    once()
    idle = measure(lambda: time.sleep(IDLE_SECONDS), meters)
    busy = measure(work, meters)
    generated = repeats * new_tokens
    return {
        "absent": absent,
        "prompt": prompt,
        "tokens": generated,
        "seconds": busy.seconds,
        "idle_watts": {name: joules / idle.seconds for name, joules in idle.joules.items()},
        "watts": {name: joules / busy.seconds for name, joules in busy.joules.items()},
        "joules_per_token": {name: joules / generated for name, joules in busy.joules.items()},
    }


def table(figures: Mapping[str, Any]) -> str:
    """The figures as text."""
    length, size = figures["length"], figures["bytes"]
    lines = [f"operations of {length} tokens, floats counted as {figures['floats']}:"]
    for row in figures["operations"]:
        lines.append(
            f"  {row['part']:10} {row['number']:8} {row['adds']:.4g} adds, {row['multiplies']:.4g} products"
        )
    lines.append("energy by arithmetic (2310.11453), joules:")
    for process, energy in figures["joules"].items():
        lines.append(
            f"  {process:5} {energy['total']:.4g} (products {energy['multiply']:.4g}, adds {energy['add']:.4g}), "
            f"{energy['per_token']:.3g} per token; with the head {energy['total_with_head']:.4g}; "
            f"{energy['floats_over_this']:.2f} times less than in floats"
        )
    lines.append(f"memory: {size['weights_total']:,d} bytes of weights")
    lines += [f"  {name:22} {nbytes:16,d}" for name, nbytes in size["weights"].items()]
    lines.append(f"  {'KV cache ' + size['kv_format']:22} {size['kv_cache']:16,d} for {length} tokens")
    return "\n".join(lines + _measured_lines(figures.get("measured")))


def _measured_lines(measured: Mapping[str, Any] | None) -> list[str]:
    if measured is None:
        meters, absent = open_meters()
        return [f"measured, {meter.name}: available with --measure" for meter in meters] + _absent_lines(
            absent
        )
    lines = _absent_lines(measured["absent"])
    for name, cost in measured.get("joules_per_token", {}).items():
        lines.append(
            f"measured, {name}: {cost:.3g} joules per token ({measured['tokens']} in {measured['seconds']:.1f} s) "
            f"({measured['watts'][name]:.1f} W, idle {measured['idle_watts'][name]:.1f} W)"
        )
    return lines


def _absent_lines(absent: Mapping[str, str]) -> list[str]:
    return [f"measured, {kind}: not available here: {reason}" for kind, reason in absent.items()]
