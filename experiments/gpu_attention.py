"""Attention in training, value and gradient: the project's, in pieces, beside jax.nn.dot_product_attention.

    python -m experiments.gpu_attention --json attention.json                         cuDNN's, on a GPU
    python -m experiments.gpu_attention --implementation xla --batch 1 --length 64     anywhere

Causal softmax attention of bfloat16 queries, keys and values. Reports the largest difference of the values and of the
gradients, relative to the largest value, and milliseconds of both.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from bitnet_experiments.provenance import provenance
from bitnet_jax.nn.attention import in_pieces, mix_values, softmax

HEADS, KV_HEADS, SIZE = 16, 4, 128
REPEATS = 10


def ours(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    B, T = q.shape[:2]
    visible = jnp.broadcast_to(jnp.tril(jnp.ones((T, T), bool)), (B, T, T))

    def mixed(q: jax.Array, k: jax.Array, v: jax.Array, visible: jax.Array) -> jax.Array:
        return mix_values(softmax(q, k, visible, SIZE**-0.5), v)

    return in_pieces(mixed, q, k, v, visible)


@jax.numpy_dtype_promotion("standard")  # jax.nn.dot_product_attention mixes dtypes
def compare(implementation: str, batch: int, length: int) -> dict[str, Any]:
    def theirs(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        attention: Any = jax.nn.dot_product_attention
        return attention(q, k, v, is_causal=True, implementation=implementation)

    shapes = [(batch, length, heads, SIZE) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    keys = jax.random.split(jax.random.key(0), 3)
    inputs = [jax.random.normal(key, shape, jnp.bfloat16) for key, shape in zip(keys, shapes, strict=True)]
    results, milliseconds = {}, {}
    for name, attend in {"ours": ours, implementation: theirs}.items():

        def loss(*inputs: jax.Array, attend: Any = attend) -> tuple[jax.Array, jax.Array]:
            o = attend(*inputs)
            return jnp.sum(jnp.sin(o.astype(jnp.float32))), o

        step = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))
        (_, o), gradients = jax.block_until_ready(step(*inputs))
        results[name] = [x.astype(jnp.float32) for x in (o, *gradients)]
        times = []
        for _ in range(REPEATS):
            began = time.perf_counter()
            jax.block_until_ready(step(*inputs))
            times.append(time.perf_counter() - began)
        milliseconds[name] = round(sorted(times)[REPEATS // 2] * 1e3, 3)
    differences = [
        float(jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(b)))
        for a, b in zip(results["ours"], results[implementation], strict=True)
    ]
    return {
        "shapes": shapes,
        "relative_differences": dict(zip(("o", "dq", "dk", "dv"), differences, strict=True)),
        "milliseconds": milliseconds,
        "device": jax.devices()[0].device_kind,
        "provenance": provenance(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--implementation", choices=("cudnn", "xla"), default="cudnn")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    row = compare(options.implementation, options.batch, options.length)
    print(json.dumps(row, indent=1))
    if options.json is not None:
        options.json.write_text(json.dumps(row, indent=1) + "\n")
    if (worst := max(row["relative_differences"].values())) > 0.05:  # a few steps of bfloat16, 2^-8 each
        raise SystemExit(f"error: got a relative difference of {worst:.3f}, expected at most 0.05")


if __name__ == "__main__":
    main()
