"""packed_matmul: argument checks, choice of implementation, gradient."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bitnet_kernels import cpu, reference
from bitnet_kernels.formats import dequantize
from bitnet_kernels.packed import FORMATS, PackedArray, validate

# x [m, k], int8 codes or float32, and packed matrices -> float32 [m, n] of each
ScaledMatmuls = Callable[[jax.Array, Sequence[PackedArray]], tuple[jax.Array, ...]]
IMPLEMENTATIONS: dict[str, ScaledMatmuls] = {
    "cpu": cpu.scaled_matmuls,
    "reference": reference.scaled_matmuls,
}


class Choice(NamedTuple):
    """What packed_matmul runs, and why: a key of IMPLEMENTATIONS, its instruction set if it has one."""

    name: str
    isa: str | None
    reason: str


def choose_implementation(w: PackedArray, platform: str | None = None) -> Choice:
    """The implementation that packed_matmul(implementation=None) takes for w on a platform.

    platform is "cpu", "gpu" or "tpu", or None for JAX's default. Raises ValueError where
    BITNET_KERNELS_ISA names an instruction set that this machine lacks.
    """
    platform = platform or jax.default_backend()
    if platform != "cpu":
        return Choice(
            "reference", None, f"no kernel for platform {platform!r} yet: XLA unpacks and multiplies"
        )
    reason = _cpu_obstacle(w)
    if reason:
        return Choice("reference", None, reason)
    isa = cpu.isa()
    forced = os.environ.get(cpu.ISA_VARIABLE)
    why = f"forced by {cpu.ISA_VARIABLE}" if forced else f"fastest of {', '.join(cpu.available_isas())}"
    return Choice("cpu", isa, f"C++ custom call, {isa} {why}")


def _cpu_obstacle(w: PackedArray) -> str | None:
    """Why the C++ kernels cannot multiply by w, or None."""
    if w.group_size > (most := FORMATS[w.format].max_inputs):
        return f"k={w.group_size} inputs a group exceed the {most} of the int32 accumulators of {w.format}"
    return cpu.unavailable()


def packed_matmul(
    x: jax.Array, w: PackedArray, *, activation_bits: int | None = 8, implementation: str | None = None
) -> jax.Array:
    """x [..., k] times the transpose of a packed matrix [n, k] -> float32 [..., n].

    x float, activation_bits=8: x is quantized to int8 per token (reference.quantize_activations), multiplied
    in integers and rescaled in float32, y = sum_g(sums_g * w.scale_g) * x.scale. Its gradient to x goes
    straight through the rounding: dx = dy @ dequantize(w). w gets no gradient.
    x int8: x holds codes already; returns sum_g(sums_g * w.scale_g), which the caller multiplies by the
    scale of the tokens. activation_bits=1 promises that all of them are -1 or 1 (nothing checks it), and
    products with a binary w count bits.
    x float, activation_bits=None: weight-only; a float32 product with the unpacked codes, by XLA.

    implementation=None takes what choose_implementation names, on the platform that the code is compiled
    for; "cpu" or "reference" is an order, refused by a NotImplementedError with the reason where it cannot be
    followed. All give the same bits. BITNET_KERNELS_ISA is read when a call is traced.
    Works under jit, grad, vmap (of x and of w), scan and while_loop; inside shard_map, build a PackedArray of
    the local codes and scale with the local shape.
    """
    return packed_matmuls(x, (w,), activation_bits=activation_bits, implementation=implementation)[0]


def packed_matmuls(
    x: jax.Array,
    ws: Sequence[PackedArray],
    *,
    activation_bits: int | None = 8,
    implementation: str | None = None,
) -> tuple[jax.Array, ...]:
    """packed_matmul of one x with several matrices of k inputs: x is quantized once, and the C++ kernels
    run them as one parallel loop. The results are those of packed_matmul, bit for bit."""
    for w in ws:
        validate(w, contents=False)
    if x.dtype != np.int8 and not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x is {x.dtype}; expected a float type, or int8 for codes")
    for w in ws:
        if x.ndim < 1 or x.shape[-1] != w.shape[1]:
            raise ValueError(
                f"x has shape {x.shape}; expected (..., {w.shape[1]}) for a matrix of shape {w.shape}"
            )
    if not ws:
        raise ValueError("got no matrices; expected at least one")
    if activation_bits not in (8, None) and not (activation_bits == 1 and x.dtype == np.int8):
        raise ValueError(f"activation_bits={activation_bits}; expected 8, None, or 1 for int8 x of -1 and 1")
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(
            f"implementation={implementation!r}; expected None or one of {sorted(IMPLEMENTATIONS)}"
        )

    if implementation == "cpu" and x.dtype != np.int8 and activation_bits is None:
        raise NotImplementedError("implementation='cpu' has no product of float activations; use 'reference'")
    obstacle = next(filter(None, map(_cpu_obstacle, ws)), None)
    name, isa = cpu.resolve("packed_matmul", implementation, obstacle)
    return _matmuls(x, tuple(ws), activation_bits, name, isa)


@jax.jit(static_argnums=(2, 3, 4))
def _matmuls(
    x: jax.Array,
    ws: tuple[PackedArray, ...],
    activation_bits: int | None,
    implementation: str | None,
    isa: str | None,
) -> tuple[jax.Array, ...]:
    multiply = _scaled_matmuls(implementation, activation_bits, isa)
    rows = x.reshape(-1, x.shape[-1])
    if x.dtype == np.int8:
        ys = multiply(rows, ws)
    elif activation_bits is None:
        ys = tuple(reference.rescale(reference.float_matmul(rows, w), w.scale) for w in ws)
    else:
        ys = _quantized_matmuls(multiply, rows.astype(jnp.float32), ws)
    return tuple(y.reshape(*x.shape[:-1], w.shape[0]) for y, w in zip(ys, ws, strict=True))


def _scaled_matmuls(
    implementation: str | None, activation_bits: int | None, isa: str | None
) -> ScaledMatmuls:
    if implementation == "reference":
        return reference.scaled_matmuls
    by_cpu = functools.partial(cpu.scaled_matmuls, activation_bits=activation_bits or 8, isa_name=isa)
    default = {"default": reference.scaled_matmuls} if implementation is None else {}
    return lambda x, ws: jax.lax.platform_dependent(x, ws, cpu=by_cpu, **default)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _quantized_matmuls(
    multiply: ScaledMatmuls, x: jax.Array, ws: tuple[PackedArray, ...]
) -> tuple[jax.Array, ...]:
    return multiply(x, ws)


def _forward(
    multiply: ScaledMatmuls, x: jax.Array, ws: tuple[PackedArray, ...]
) -> tuple[tuple[jax.Array, ...], tuple[PackedArray, ...]]:
    return multiply(x, ws), ws


def _backward(
    multiply: ScaledMatmuls, ws: tuple[PackedArray, ...], dys: tuple[jax.Array, ...]
) -> tuple[jax.Array, None]:
    products = [dy @ dequantize(w) for dy, w in zip(dys, ws, strict=True)]
    return functools.reduce(jnp.add, products), None


_quantized_matmuls.defvjp(_forward, _backward)
