"""packed_matmul: argument checks, choice of implementation, gradient."""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bitnet_kernels import cpu, reference
from bitnet_kernels.formats import dequantize
from bitnet_kernels.packed import PackedArray, validate

# int8 codes [m, k] and a packed matrix -> float32 [m, n]
ScaledMatmul = Callable[[jax.Array, PackedArray], jax.Array]
IMPLEMENTATIONS: dict[str, ScaledMatmul] = {
    "cpu": cpu.scaled_matmul,
    "reference": reference.scaled_matmul,
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
    if w.group_size > cpu.MAX_GROUP_INPUTS:
        return f"k={w.group_size} inputs a group exceed the {cpu.MAX_GROUP_INPUTS} of the int32 accumulators"
    return cpu.unavailable()


def packed_matmul(
    x: jax.Array, w: PackedArray, *, activation_bits: int | None = 8, implementation: str | None = None
) -> jax.Array:
    """x [..., k] times the transpose of a packed matrix [n, k] -> float32 [..., n].

    x float, activation_bits=8: x is quantized to int8 per token (reference.quantize_activations), multiplied
    in integers and rescaled in float32, y = sum_g(sums_g * w.scale_g) * x.scale. Its gradient to x goes
    straight through the rounding: dx = dy @ dequantize(w). w gets no gradient.
    x int8: x holds codes already; returns sum_g(sums_g * w.scale_g), which the caller multiplies by the
    scale of the tokens.
    x float, activation_bits=None: weight-only; a float32 product with the unpacked codes, by XLA.

    implementation=None takes what choose_implementation names, on the platform that the code is compiled
    for; "cpu" or "reference" is an order, refused by a NotImplementedError with the reason where it cannot be
    followed. All give the same bits. BITNET_KERNELS_ISA is read when a call is traced.
    Works under jit, grad, vmap (of x and of w), scan and while_loop; inside shard_map, build a PackedArray of
    the local codes and scale with the local shape.
    """
    validate(w, contents=False)
    if x.dtype != np.int8 and not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x is {x.dtype}; expected a float type, or int8 for codes")
    if x.ndim < 1 or x.shape[-1] != w.shape[1]:
        raise ValueError(
            f"x has shape {x.shape}; expected (..., {w.shape[1]}) for a matrix of shape {w.shape}"
        )
    if activation_bits not in (8, None):
        raise ValueError(f"activation_bits={activation_bits}; expected 8 or None")
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(
            f"implementation={implementation!r}; expected None or one of {sorted(IMPLEMENTATIONS)}"
        )

    if implementation == "cpu" and x.dtype != np.int8 and activation_bits is None:
        raise NotImplementedError("implementation='cpu' has no product of float activations; use 'reference'")
    name, isa = _resolve(implementation, w)
    return _matmul(x, w, activation_bits, name, isa)


def _resolve(implementation: str | None, w: PackedArray) -> tuple[str | None, str | None]:
    """(implementation, instruction set); (None, isa) leaves the choice to the platform of compilation."""
    if implementation == "reference":
        return "reference", None
    obstacle = _cpu_obstacle(w)
    if not obstacle:
        return implementation, cpu.isa()
    if implementation == "cpu":
        raise NotImplementedError(f"implementation='cpu' cannot be used: {obstacle}")
    _warn_once(obstacle)
    return "reference", None


@functools.cache
def _warn_once(obstacle: str) -> None:
    if jax.default_backend() == "cpu":
        warnings.warn(
            f"packed_matmul runs on XLA, much slower than the C++ kernels: {obstacle}",
            RuntimeWarning,
            stacklevel=4,
        )


@jax.jit(static_argnums=(2, 3, 4))
def _matmul(
    x: jax.Array, w: PackedArray, activation_bits: int | None, implementation: str | None, isa: str | None
) -> jax.Array:
    scaled_matmul = _scaled_matmul(implementation, isa)
    rows = x.reshape(-1, x.shape[-1])
    if x.dtype == np.int8:
        y = scaled_matmul(rows, w)
    elif activation_bits is None:
        y = reference.rescale(reference.float_matmul(rows, w), w.scale)
    else:
        y = _quantized_matmul(scaled_matmul, rows.astype(jnp.float32), w)
    return y.reshape(*x.shape[:-1], w.shape[0])


def _scaled_matmul(implementation: str | None, isa: str | None) -> ScaledMatmul:
    if implementation == "reference":
        return reference.scaled_matmul
    by_cpu = functools.partial(cpu.scaled_matmul, isa_name=isa)
    default = {"default": reference.scaled_matmul} if implementation is None else {}
    return lambda x, w: jax.lax.platform_dependent(x, w, cpu=by_cpu, **default)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _quantized_matmul(scaled_matmul: ScaledMatmul, x: jax.Array, w: PackedArray) -> jax.Array:
    codes, scale = reference.quantize_activations(x)
    return scaled_matmul(codes, w) * scale


def _forward(scaled_matmul: ScaledMatmul, x: jax.Array, w: PackedArray) -> tuple[jax.Array, PackedArray]:
    return _quantized_matmul(scaled_matmul, x, w), w


def _backward(scaled_matmul: ScaledMatmul, w: PackedArray, dy: jax.Array) -> tuple[jax.Array, None]:
    return dy @ dequantize(w), None


_quantized_matmul.defvjp(_forward, _backward)
