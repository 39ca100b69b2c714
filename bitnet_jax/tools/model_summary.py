"""A model on one screen: architecture, precision of its layers, what a decode step reads, and what it says of itself.

The expected speed is what memory allows: the fastest of several reads of READ_BYTES by all threads on this machine,
divided by the bytes that a decode step reads. It is an estimate and no bound: the loop that reads does not reach the
limit of every processor (docs/limits.md), and a model that fits the caches can be faster.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from typing import Any

from flax.traverse_util import flatten_dict

from bitnet_jax.inference.cache import default_kv_format, kv_bytes
from bitnet_jax.model_folders import matrices
from bitnet_jax.models import Architecture, ModelConfig
from bitnet_kernels import PackedArray
from bitnet_kernels.machine import read_all, small_pages

EMBEDDINGS = ("embed/embedding", "embed/weight")  # floats, or integer codes
READ_BYTES, READS = 1 << 28, 5
TEMPLATE_SHOWN = 60  # characters of a chat template


def decode_bytes(config: ModelConfig, variables: Mapping[str, Any]) -> dict[str, int]:
    """Bytes that a decode step reads without the KV cache: weights, scales, head, and other (norms, biases, one row of
    each table that is only looked up)."""
    parts = {"weights": 0, "scales": 0, "head": 0, "other": 0}
    linear = {f"{path}/weight" for path in config.linear_shapes()}
    embedding_is_head = config.tie_embeddings and config.head == "float"
    leaves = {
        **flatten_dict(dict(variables["params"]), sep="/"),
        **flatten_dict(dict(variables.get("packed", {})), sep="/"),
    }
    for path, leaf in leaves.items():
        if path.startswith("lm_head/") or (path in EMBEDDINGS and embedding_is_head):
            parts["head"] += leaf.nbytes
        elif path in (*EMBEDDINGS, "position_embed/embedding"):
            parts["other"] += leaf.nbytes // leaf.shape[0]
        elif isinstance(leaf, PackedArray):
            parts["scales"] += leaf.nbytes - leaf.codes.nbytes  # and minima
            parts["weights"] += leaf.codes.nbytes
        else:
            parts["weights" if path in linear else "other"] += leaf.nbytes
    return parts


def read_ceiling() -> float | None:
    """Bytes per second that all threads read from memory here; None without the C++ library."""
    data = small_pages(READ_BYTES)
    call = read_all(data)
    if call is None:
        return None
    best = 0.0
    for round in range(READS + 1):  # the first one starts the threads
        began = time.perf_counter()
        call.run(round)
        best = max(best, call.amount / (time.perf_counter() - began) if round else 0.0)
    return best


def decode_figures(config: ModelConfig, variables: Mapping[str, Any]) -> dict[str, Any]:
    """What a decode step reads, and the tokens per second that memory allows on this machine."""
    parts, ceiling = decode_bytes(config, variables), read_ceiling()
    total, kv_format = sum(parts.values()), default_kv_format(config, variables)
    return {
        "bytes_per_token": parts | {"total": total},
        "kv_bytes_per_position": kv_bytes(config, config.known_length, kv_format) // config.known_length,
        "read_ceiling_gbytes_per_second": ceiling and ceiling / 1e9,
        "expected_tokens_per_second": ceiling and ceiling / total,
    }


def layer_groups(config: Architecture, variables: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Linear layers that differ only in the number of their block, in the order of the forward pass."""
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for path, row in matrices(config, variables).items():
        name = re.sub(r"^layers_\d+/", "", path)
        key = (name, *row["shape"], row["recipe"], row["stored"])
        group = groups.setdefault(key, {"layers": name, "count": 0, **row, "bytes": 0})
        group["count"] += 1
        group["bytes"] += row["bytes"]
    return list(groups.values())


def describe_architecture(config: ModelConfig) -> str:
    """The shape of a Transformer in words."""
    kind = "encoder" if not config.causal else "classifier" if config.num_classes else "decoder"
    head = "tied head" if config.tie_embeddings else "untied head"
    heads = f"{config.num_heads} heads of {config.head_size}"
    heads += f" ({config.kv_heads} of keys)" if config.kv_heads != config.num_heads else ""
    extras = [
        head if config.pooling == "none" else f"{config.pooling} of the hidden states",
        f"{config.norm_placement} norms",
        *(["norms of q and k"] if config.qk_norm else []),
        *([f"biases of {', '.join(config.biased)}"] if config.biased else []),
        *([f"window of {config.sliding_window}"] if config.sliding_window else []),
        *([f"rope scaling {config.rope_scaling.kind}"] if config.rope_scaling else []),
    ]
    return (
        f"{kind}, {config.num_layers} layers of width {config.hidden_size}, {heads}, {config.mlp} of "
        f"{config.ffn_size}, {config.vocab_size} tokens; {', '.join(extras)}"
    )


def describe_length(config: ModelConfig) -> str:
    trained = "not stated" if config.trained_length is None else f"{config.trained_length}"
    return f"{config.max_length} positions, trained length {trained}"


def describe_decode(figures: Mapping[str, Any]) -> list[str]:
    parts = figures["bytes_per_token"]
    shown = ", ".join(f"{name} {nbytes:,d}" for name, nbytes in parts.items() if name != "total")
    lines = [
        f"bytes per token: {parts['total']:,d} ({shown}); "
        f"KV cache: {figures['kv_bytes_per_position']:,d} more a position"
    ]
    ceiling = figures["read_ceiling_gbytes_per_second"]
    if ceiling is None:
        return [*lines, "expected speed: not known, for the C++ library that measures memory is absent"]
    return [
        *lines,
        f"expected speed: about {figures['expected_tokens_per_second']:,.1f} tokens/s, as memory allows: "
        f"{ceiling:.1f} GB/s, the fastest of {READS} reads of {READ_BYTES >> 20} MiB of memory here, by these bytes",
    ]


def describe_template(template: str | None) -> str:
    if template is None:
        return "no"
    words = " ".join(template.split())
    return f"yes, {len(template)} characters: {words[:TEMPLATE_SHOWN]}{'...' if len(words) > TEMPLATE_SHOWN else ''}"
