"""packed_matmul: argument validation, choice of implementation, gradient."""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bitnet_kernels import cpu, reference
from bitnet_kernels.cpu import warn_once
from bitnet_kernels.dtypes import FLOATS
from bitnet_kernels.formats import dequantize, relayout
from bitnet_kernels.packed import FORMATS, LAYOUTS, PackedArray, validate

# (x [m, k], int8 codes or float32; packed matrices) -> float32 [m, n] for each
ScaledMatmuls = Callable[[jax.Array, Sequence[PackedArray]], tuple[jax.Array, ...]]
CODES = (np.int8, np.int16)
IMPLEMENTATIONS = ("cpu", "gpu", "reference", "tpu")
_XLA_PLATFORM = {"cpu": "cpu", "gpu": "cuda", "tpu": "tpu"}  # names in lax.platform_dependent


class Choice(NamedTuple):
    """What packed_matmul runs: one of IMPLEMENTATIONS, its instruction set if any, and the reason."""

    name: str
    isa: str | None
    reason: str


def choose_implementation(w: PackedArray, platform: str | None = None) -> Choice:
    """The implementation that packed_matmul(implementation=None) selects for w on a platform.

    platform is "cpu", "gpu" or "tpu", or None for JAX's default. Raises ValueError if BITNET_KERNELS_ISA names an
    instruction set that this machine lacks.
    """
    platform = platform or jax.default_backend()
    reason = _obstacle(w, platform)
    if reason:
        return Choice("reference", None, f"XLA unpacks and multiplies: {reason}")
    if platform != "cpu":
        return Choice(platform, None, f"Pallas kernel for layout {w.layout}")
    isa = cpu.isa()
    forced = os.environ.get(cpu.ISA_VARIABLE)
    why = f"forced by {cpu.ISA_VARIABLE}" if forced else f"fastest of {', '.join(cpu.available_isas())}"
    return Choice("cpu", isa, f"C++ custom call, {isa} {why}")


def for_platform(w: PackedArray, platform: str | None = None) -> PackedArray:
    """w in the layout for a platform (None: JAX's default); unchanged if no kernel of the platform supports it."""
    platform = platform or jax.default_backend()
    layout = next((name for name, where in LAYOUTS.items() if where == platform), None)
    if layout in (None, w.layout) or layout not in FORMATS[w.format].layouts:
        return w
    moved = relayout(w, layout)
    return w if _obstacle(moved, platform) else moved


def _obstacle(w: PackedArray, platform: str) -> str | None:
    """Why the kernels of a platform cannot use w, or None if they can."""
    layout = next((name for name, where in LAYOUTS.items() if where == platform), None)
    if layout is None:
        return f"there are no kernels for platform {platform!r}"
    if w.layout != layout:
        if layout not in FORMATS[w.format].layouts:
            return f"{w.format} has no layout for platform {platform!r}"
        return f"layout {w.layout!r} is for platform {LAYOUTS[w.layout]!r}; call relayout(w, {layout!r}) once"
    if w.group_size > (most := FORMATS[w.format].max_inputs):
        return (
            f"k={w.group_size} inputs per group exceed the {most} that int32 accumulators of {w.format} allow"
        )
    return cpu.unavailable() if platform == "cpu" else _pallas(platform).obstacle(w)


def _pallas(platform: str) -> ModuleType:
    """The Pallas backend of a platform, imported lazily: CPU needs no Pallas."""
    return importlib.import_module(f"bitnet_kernels.pallas_{platform}")


def packed_matmul(
    x: jax.Array, w: PackedArray, *, activation_bits: int | None = 8, implementation: str | None = None
) -> jax.Array:
    """x [..., k] times the transpose of a packed matrix [n, k] -> float32 [..., n].

    x float (one of dtypes.FLOATS), activation_bits=8: x is quantized to int8 per token
    (reference.quantize_activations), multiplied in integers and rescaled in float32,
    y = sum_g(sums_g * w.scale_g) * x.scale. In uint4 a group adds sums_g * w.scale_g + x_sums_g * w.minimum_g, where
    x_sums_g is the sum of the codes of x. The gradient to x is straight-through, dx = dy @ dequantize(w); w gets none.
    activation_bits=16: likewise with 16-bit codes, which are multiplied as two int8 digits,
    y = (256 y_high + y_low) * x.scale. The input loses less than in bfloat16, so this is the fast way to quantize
    only the weights; it takes two rows of x for one.
    x int8, or int16 with activation_bits=16 or None: x holds codes (int16: within +-reference.PEAK_16); returns the sum
    over groups, which the caller multiplies by the scale of the tokens.
    activation_bits=1 asserts that all int8 codes are -1 or 1 (unchecked); products with a binary w then use popcounts.
    x float, activation_bits=None: a float32 product with the unpacked codes, by XLA.

    implementation=None selects what choose_implementation returns for the platform compiled for, whose kernels need
    their own layout of w (LAYOUTS; relayout converts). A name forces an implementation. All are bit-identical.
    BITNET_KERNELS_ISA is read at trace time.
    Works under jit, grad, vmap (over x and w), scan and while_loop; inside shard_map, build a PackedArray of the
    local codes and scale with the local shape.

    Raises:
      ValueError: an invalid dtype or shape, an unknown option.
      NotImplementedError: the named implementation cannot be used here.
    """
    return packed_matmuls(x, (w,), activation_bits=activation_bits, implementation=implementation)[0]


def packed_matmuls(
    x: jax.Array,
    ws: Sequence[PackedArray],
    *,
    activation_bits: int | None = 8,
    implementation: str | None = None,
) -> tuple[jax.Array, ...]:
    """packed_matmul of one x with several matrices of k inputs: x is quantized once, and the C++ kernels run all
    matrices in one parallel loop. Results are bit-identical to packed_matmul."""
    for w in ws:
        validate(w, contents=False)
    x = jnp.asarray(x)
    if x.dtype not in CODES and x.dtype.name not in FLOATS:
        raise ValueError(
            f"x is {x.dtype}; expected a float type, or int8 or int16 for codes: {', '.join(FLOATS)}, int8, int16"
        )
    for w in ws:
        if x.ndim < 1 or x.shape[-1] != w.shape[1]:
            raise ValueError(
                f"x has shape {x.shape}; expected (..., {w.shape[1]}) for a matrix of shape {w.shape}"
            )
    if not ws:
        raise ValueError("got no matrices; expected at least one")
    widths = {"int8": (8, 1), "int16": (16,)}.get(x.dtype.name, (8, 16))
    if activation_bits not in (*widths, None):
        raise ValueError(
            f"activation_bits={activation_bits}; expected None or one of {', '.join(map(str, widths))} for {x.dtype} x"
            + (" (1 if all codes are -1 or 1)" if x.dtype == np.int8 else "")
        )
    if x.dtype in CODES and activation_bits is None:
        activation_bits = widths[0]
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(
            f"implementation={implementation!r}; expected None or one of {sorted(IMPLEMENTATIONS)}"
        )

    if activation_bits is None:
        if implementation not in (None, "reference"):
            raise NotImplementedError(
                f"implementation={implementation!r} has no product of float activations; use 'reference'"
            )
        return _matmuls(x, tuple(ws), None, "reference", None, False)
    return _matmuls(x, tuple(ws), activation_bits, *_resolve(ws, implementation))


def _resolve(ws: Sequence[PackedArray], implementation: str | None) -> tuple[str, str | None, bool]:
    """(implementation, its instruction set, whether fallback is forbidden); warns if XLA replaces the kernels."""
    if implementation == "reference":
        return "reference", None, True
    kernels, here = implementation or LAYOUTS[ws[0].layout], jax.default_backend()
    obstacle = _first_obstacle(ws, kernels)
    if implementation and obstacle:
        raise NotImplementedError(f"implementation={implementation!r} cannot be used: {obstacle}")
    if not implementation and (missed := obstacle if here == kernels else _first_obstacle(ws, here)):
        warn_once("packed_matmul", missed)
    if obstacle:
        return "reference", None, True
    if kernels == "cpu":
        return kernels, cpu.isa(), implementation is not None or cpu.is_for_cpu_alone()
    return kernels, None, implementation is not None


def _first_obstacle(ws: Sequence[PackedArray], platform: str) -> str | None:
    return next(filter(None, (_obstacle(w, platform) for w in ws)), None)


@jax.jit(static_argnums=(2, 3, 4, 5))
def _matmuls(
    x: jax.Array,
    ws: tuple[PackedArray, ...],
    activation_bits: int | None,
    implementation: str,
    isa: str | None,
    ordered: bool,
) -> tuple[jax.Array, ...]:
    rows = x.reshape(-1, x.shape[-1])
    if activation_bits is None:
        ys = tuple(reference.scaled_float_matmul(rows, w) for w in ws)
    else:
        multiply = _scaled_matmuls(implementation, activation_bits, isa, ordered)
        ys = (
            multiply(rows, ws)
            if x.dtype in CODES
            else _quantized_matmuls(multiply, rows.astype(jnp.float32), ws)
        )
    return tuple(y.reshape(*x.shape[:-1], w.shape[0]) for y, w in zip(ys, ws, strict=True))


def _scaled_matmuls(
    implementation: str, activation_bits: int, isa: str | None, ordered: bool
) -> ScaledMatmuls:
    """The kernels on their platform; on any other XLA, or an error if they were named explicitly (`ordered`)."""
    by_xla = reference.matmuls_of_digits if activation_bits == 16 else reference.scaled_matmuls
    if implementation == "reference":
        return by_xla
    if implementation == "cpu":
        kernels = functools.partial(cpu.scaled_matmuls, activation_bits=activation_bits, isa_name=isa)
    else:
        kernels = _pallas(implementation).scaled_matmuls
        if activation_bits == 16:
            kernels = functools.partial(reference.matmuls_of_digits, multiply=kernels)
    branches = {_XLA_PLATFORM[implementation]: kernels} | ({} if ordered else {"default": by_xla})
    return lambda x, ws: jax.lax.platform_dependent(x, ws, **branches)


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
