"""Checks of every kernel of this machine, by implementation and instruction set, against NumPy; used by the doctor.

products          integer sums of every format, exact
scaled products   the same with scales, for int8 codes, for floats quantized on the fly and for packed signs: exact,
                  in float32
attention         over a cache of every format: within float32 rounding of float64, and bit-identical C++ loops for
                  every instruction set
head              bfloat16 logits: within the bound stated in head.py, and bit-identical as above; the largest logits
                  found through an int8 copy are bit-identical to these
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from bitnet_kernels import (
    FORMATS,
    PackedArray,
    bfloat16_logits,
    cpu,
    exact_top_logits,
    head_bounds,
    pack,
    reference,
    reference_attention,
)
from bitnet_kernels.packed import SCALE_DTYPES

# m rows, n outputs, k inputs, G groups: one of everything, odd sizes, full blocks, groups, and a prefill.
SHAPES = (
    (1, 1, 1, 1), (1, 16, 64, 1), (3, 17, 65, 1), (2, 48, 256, 4), (7, 100, 1000, 1), (64, 256, 512, 2),
    (12, 50, 192, 6),
)  # fmt: skip
# B, T, H, K, h, S and written positions: one query of one key, groups of heads and odd sizes, several chunks of keys.
ATTENTIONS = ((1, 1, 1, 1, 8, 1, 1), (2, 3, 6, 3, 20, 150, 149), (1, 1, 4, 1, 128, 300, 280))
HEADS = ((1, 1, 1), (1, 37, 16), (7, 70, 33), (2, 1000, 160))  # m rows of x, n of the table, k inputs
TOP = 3  # of the exact head

Product = Callable[[np.ndarray, PackedArray], np.ndarray]  # (codes of the weights, packed weights) -> [m, n]
# Scores, weights and outputs are float32 sums of at most 300 terms of size 1: at most 300 roundings of 2^-24.
ATTENTION_TOLERANCE = 2e-5


@dataclasses.dataclass(frozen=True)
class Check:
    """One line of the report: a check that passed or failed, or (passed=None) something absent and why."""

    name: str
    passed: bool | None
    detail: str


def checked(name: str, work: Callable[[], str]) -> Check:
    """Runs one check; any exception is reported as a failed check."""
    try:
        return Check(name, True, work())
    except Exception as error:
        return Check(name, False, f"{type(error).__name__}: {error}")


def check_kernels() -> list[Check]:
    """All kinds of kernels, each with the reference and with every instruction set."""
    kinds = {
        "products": _products,
        "scaled products": _scaled_products,
        "attention": _attention,
        "head": _heads,
    }
    places = {"reference": None} | {f"cpu ({isa})": isa for isa in cpu.available_isas()}
    return [
        checked(f"{kind}, {place}", functools.partial(work, isa))
        for kind, work in kinds.items()
        for place, isa in places.items()
    ]


@contextlib.contextmanager
def instruction_set(isa: str | None) -> Iterator[None]:
    """Whatever is traced inside uses this instruction set (None: no change)."""
    before = os.environ.get(cpu.ISA_VARIABLE)
    if isa is not None:
        os.environ[cpu.ISA_VARIABLE] = isa
    try:
        yield
    finally:
        os.environ.pop(cpu.ISA_VARIABLE, None)
        if before is not None:
            os.environ[cpu.ISA_VARIABLE] = before


def _compare(what: str, got: Any, expected: np.ndarray) -> None:
    """Raises ValueError unless both are equal, element by element."""
    wrong = np.asarray(got) != expected
    if wrong.any():
        raise ValueError(f"{what}: {wrong.sum()} of {wrong.size} differ")


def _in_one_program(calls: list[tuple[Callable[..., Any], tuple[Any, ...]]]) -> list[Any]:
    """function(*arguments) of every call. Compiling a program for each would be most of the time of a check."""
    functions = [function for function, _ in calls]
    program = jax.jit(lambda cases: [f(*case) for f, case in zip(functions, cases, strict=True)])
    return program([arguments for _, arguments in calls])


def _case(
    random: np.random.Generator, format: str, shape: tuple[int, int, int, int], scale_dtype: str = "float32"
) -> tuple[np.ndarray, np.ndarray, np.ndarray, PackedArray]:
    """x int8 [m, k], codes int8 [n, k], their exact sums [G, m, n], and the codes packed with random scales."""
    m, n, k, groups = shape
    codes = random.choice(np.array(FORMATS[format].values, np.int8), (n, k))
    x = random.integers(-128, 128, (m, k), dtype=np.int8)
    scale, minimum = (
        jnp.asarray(random.random((n, groups), np.float32)).astype(scale_dtype) for _ in range(2)
    )
    w = pack(jnp.asarray(codes), scale, format, minimum=minimum if FORMATS[format].has_minimum else None)
    return x, codes, _sums(x, codes, groups), w


def _sums(x: np.ndarray, codes: np.ndarray, groups: int) -> np.ndarray:
    # In float64, where these integers are exact and NumPy has a fast product.
    rows, weights = (a.reshape(len(a), groups, -1).astype(np.float64) for a in (x, codes))
    return (rows.transpose(1, 0, 2) @ weights.transpose(1, 2, 0)).astype(np.int64)


def _scaled(x: np.ndarray, codes: np.ndarray, w: PackedArray) -> np.ndarray:
    """float32 [m, n]: groups times their scales, with every product and sum rounded, in order."""
    sums = _sums(x, codes, w.groups).astype(np.float32)
    terms = sums * np.asarray(w.scale, np.float32).T[:, None, :]
    if w.minimum is not None:
        x_sums = x.reshape(len(x), w.groups, -1).sum(axis=-1, dtype=np.int32).T.astype(np.float32)
        terms = terms + x_sums[:, :, None] * np.asarray(w.minimum, np.float32).T[:, None, :]
    return functools.reduce(np.add, terms)


def _scaled_digits(x: np.ndarray, codes: np.ndarray, w: PackedArray) -> np.ndarray:
    """`_scaled` of 16-bit codes, as the sum of the products of two digits."""
    high = (x + 128) // 256
    return np.float32(256) * _scaled(high, codes, w) + _scaled(x - 256 * high, codes, w)


def _times_scale(
    scale: np.ndarray, product: Any, x: np.ndarray, codes: np.ndarray, w: PackedArray
) -> np.ndarray:
    return scale * product(x, codes, w)


def _products(isa: str | None) -> str:
    random = np.random.default_rng(0)
    multiply = functools.partial(cpu.integer_matmul, isa_name=isa) if isa else reference.integer_matmul
    places = [(format, shape) for format in FORMATS for shape in SHAPES]
    cases = [_case(random, format, shape) for format, shape in places]
    results = _in_one_program([(multiply, (jnp.asarray(x), w)) for x, _, _, w in cases])
    for (format, (m, n, k, groups)), (_, _, sums, _), got in zip(places, cases, results, strict=True):
        _compare(f"{format} m={m} n={n} k={k} groups={groups}", got, sums)
    return f"{len(cases)} exact"


def _scaled_products(isa: str | None) -> str:
    """Multiplies all formats of a shape in one call, as layers that share an input are."""
    random = np.random.default_rng(1)
    calls: list[tuple[Callable[..., Any], tuple[Any, ...]]] = []
    expected: list[dict[str, np.ndarray]] = []  # of each call: what is multiplied -> the products

    def check(kind: str, x: np.ndarray, product: Product, formats: list[str], bits: int) -> None:
        by_cpu = functools.partial(cpu.scaled_matmuls, activation_bits=bits, isa_name=isa)
        by_xla = reference.matmuls_of_digits if bits == 16 else reference.scaled_matmuls
        ws = [packed[format] for format in formats]
        calls.append((by_cpu if isa else by_xla, (jnp.asarray(x), ws)))
        expected.append(
            {
                f"{kind} times {format} m={m} n={n} k={k} groups={groups}": product(codes[format], w)
                for format, w in zip(formats, ws, strict=True)
            }
        )

    for i, (m, n, k, groups) in enumerate(SHAPES):
        dtype = SCALE_DTYPES[i % 2]
        cases = {format: _case(random, format, (m, n, k, groups), dtype) for format in FORMATS}
        codes = {format: case[1] for format, case in cases.items()}
        packed = {format: case[3] for format, case in cases.items()}
        x = cases["binary"][0]
        check("codes", x, functools.partial(_scaled, x), list(FORMATS), 8)
        floats = random.normal(size=(m, k)).astype(np.float32)
        largest = np.maximum(np.abs(floats).max(axis=1, keepdims=True), np.float32(1e-5))
        for bits, peak, multiply in ((8, 127, _scaled), (16, 32512, _scaled_digits)):
            steps = np.float32(peak) / largest
            rounded = np.round(floats * steps).clip(-peak - 1, peak).astype(np.int64)

            scaled = functools.partial(_times_scale, np.float32(1) / steps, multiply, rounded)
            check(f"floats in {bits} bits", floats, scaled, list(FORMATS), bits)
        signs = random.choice(np.array([-1, 1], np.int8), (m, k))
        check("signs", signs, functools.partial(_scaled, signs), ["binary"], 1)
    # The definition operation by operation: compiled as a whole, a product and a sum may share one rounding.
    results = _in_one_program(calls) if isa else [function(*arguments) for function, arguments in calls]
    for ys, wanted in zip(results, expected, strict=True):
        for (what, product), y in zip(wanted.items(), ys, strict=True):
            _compare(what, y, product)
    return f"{sum(map(len, expected))} exact"


def _attention(isa: str | None) -> str:
    random, count = np.random.default_rng(2), 0
    for B, T, H, K, h, S, length in ATTENTIONS:
        q, k, v = (
            random.normal(size=size).astype(np.float32) for size in ((B, T, H, h), *[(B, S, K, h)] * 2)
        )
        visible = random.random((B, T, S)) < random.choice([0.0, 0.1, 0.6, 1.0], (B, T, 1))
        for kind in ("float32", "bfloat16", "int8"):
            stored = _stored(k, v, kind)
            arrays = [jnp.asarray(x) for x in (q, *stored, visible)]
            expected = _attention_in_float64(q, *stored, visible, length)
            if isa:
                loops = [cpu.attention(h**-0.5, name) for name in (isa, "scalar")]
                inputs = (*arrays, jnp.int32(length))
                got, scalar = map(np.asarray, _in_one_program([(loop, inputs) for loop in loops]))
                _compare(f"{kind} B={B} T={T} H={H} K={K} h={h}, with the scalar loops", got, scalar)
            else:
                keys, values, k_scale, v_scale = arrays[1:5]
                scales = {"k_scale": k_scale, "v_scale": v_scale} if kind == "int8" else {}
                got = np.asarray(
                    reference_attention(
                        arrays[0], keys, values, arrays[5], h**-0.5, length=jnp.int32(length), **scales
                    )
                )
            error = np.abs(got - expected).max()
            if not error <= ATTENTION_TOLERANCE:
                raise ValueError(
                    f"{kind} B={B} T={T} H={H} K={K} h={h}: off by {error:.2g}, expected {ATTENTION_TOLERANCE:g}"
                )
            count += 1
    return f"{count} within {ATTENTION_TOLERANCE:g}" + (", bit-identical to the scalar loops" if isa else "")


def _stored(k: np.ndarray, v: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Keys, values and their scales as stored in a cache of that kind; the scales are empty for floats."""
    if kind != "int8":
        empty = np.zeros((k.shape[0], 0, k.shape[2]), np.float32)
        dtype = ml_dtypes.bfloat16 if kind == "bfloat16" else np.float32
        return k.astype(dtype), v.astype(dtype), empty, empty
    scales = [np.abs(x).max(axis=-1) / np.float32(127) for x in (k, v)]
    codes = [np.round(x / scale[..., None]).astype(np.int8) for x, scale in zip((k, v), scales, strict=True)]
    return codes[0], codes[1], scales[0], scales[1]


def _attention_in_float64(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    k_scale: np.ndarray,
    v_scale: np.ndarray,
    visible: np.ndarray,
    length: int,
) -> np.ndarray:
    (B, T, H, h), K = q.shape, k.shape[2]
    keys, values = (
        x.astype(np.float64) * (scale[..., None] if scale.size else 1)
        for x, scale in ((k, k_scale), (v, v_scale))
    )
    seen = (visible & (np.arange(k.shape[1]) < length))[:, None, None]
    scores = np.einsum("btkgh,bskh->bkgts", q.reshape(B, T, K, H // K, h).astype(np.float64), keys) * h**-0.5
    largest = np.max(scores, axis=-1, keepdims=True, where=seen, initial=-1e300)
    p = np.where(seen, np.exp(np.minimum(scores - largest, 0)), 0)
    total = p.sum(axis=-1, keepdims=True)
    return np.einsum("bkgts,bskh->btkgh", p / np.where(total > 0, total, 1), values).reshape(B, T, H, h)


def _heads(isa: str | None) -> str:
    random = np.random.default_rng(3)
    for m, n, k in HEADS:
        x = random.normal(size=(m, k)).astype(np.float32)
        table = random.normal(size=(n, k)).astype(ml_dtypes.bfloat16)
        rows, weights = jnp.asarray(x), jnp.asarray(table)
        what = f"m={m} n={n} k={k}"
        if isa:
            logits = np.asarray(cpu.bfloat16_logits(rows, weights, isa_name=isa))
            _compare(
                f"{what}, with the scalar loops",
                logits,
                np.asarray(cpu.bfloat16_logits(rows, weights, isa_name="scalar")),
            )
        else:
            logits = np.asarray(bfloat16_logits(rows, weights, implementation="reference"))
        wide, exact_x = table.astype(np.float64), x.astype(np.float64)
        additions = k / 16 + 4 if isa else k
        bound = additions * 2.0**-24 * (np.abs(exact_x) @ np.abs(wide).T)
        wrong = ~(np.abs(logits - exact_x @ wide.T) <= bound)
        if wrong.any():
            raise ValueError(f"{what}: {wrong.sum()} of {wrong.size} logits exceed the rounding error bound")
        if isa:
            _check_exact_head(what, isa, rows, weights, logits)
    return f"{len(HEADS)} within rounding" + (
        ", bit-identical to the scalar loops; the largest exact" if isa else ""
    )


def _check_exact_head(what: str, isa: str, x: jax.Array, table: jax.Array, logits: np.ndarray) -> None:
    wide = np.asarray(table, np.float32)
    scale = np.maximum(np.abs(wide).max(axis=1, keepdims=True), np.float32(1e-5)) / np.float32(127)
    codes = np.clip(np.round(wide / scale), -127, 127).astype(np.int8)
    copy = pack(jnp.asarray(codes), jnp.asarray(scale), "int8")
    with instruction_set(isa):
        found = exact_top_logits(x, table, copy, head_bounds(table, copy), TOP, implementation="cpu")
    got = np.asarray(found.logits)
    known = ~np.isneginf(got)
    _compare(f"exact head {what}", got[known], logits[known])
    top = min(TOP, logits.shape[1])
    smallest = np.sort(logits, axis=1)[:, -top:][:, :1]
    if (missing := (logits >= smallest) & ~known).any():
        raise ValueError(f"exact head {what}: {missing.sum()} of the {top} largest logits are missing")
