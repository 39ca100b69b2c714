"""The C++ kernels: exact on every instruction set, selectable, and with clear errors when they cannot be used."""

from __future__ import annotations

import _ctypes
import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitnet_kernels import FORMATS, PackedArray, cpu, matmul, pack, packed_matmul, reference
from bitnet_kernels.packed import SCALE_DTYPES

built = pytest.mark.skipif(cpu.unavailable() is not None, reason=f"no C++ kernels: {cpu.unavailable()}")
ISAS = cpu.available_isas()

# Sizes of 1, odd sizes, whole blocks, more than one tile of 64 rows and 1024 inputs, groups, tiles of lookup tables.
SHAPES = (
    (1, 1, 1),
    (3, 31, 1),
    (16, 32, 1),
    (37, 100, 1),
    (65, 2049, 1),
    (100, 640, 20),
    (33, 96, 3),
    (50, 4096, 2),
    (150, 520, 1),
)
ROWS = (1, 2, 3, 4, 5, 6, 7, 13, 20, 33)


def exact(x: np.ndarray, codes: np.ndarray, groups: int) -> np.ndarray:
    """[G, m, n] by float64 products, exact below 2^53."""
    a = x.reshape(len(x), groups, -1).astype(np.float64).swapaxes(0, 1)
    return a @ codes.reshape(len(codes), groups, -1).astype(np.float64).transpose(1, 2, 0)


def on_every_isa(product: Callable[..., object], xs: list[jax.Array], *operands: object) -> dict[str, list]:
    """isa -> [product(x, *operands, isa_name=isa) for x in xs], compiled as one program, as compilation dominates."""

    @jax.jit
    def program(xs: list[jax.Array], *operands: object) -> dict[str, list]:
        return {isa: [product(x, *operands, isa_name=isa) for x in xs] for isa in ISAS}

    return program(xs, *operands)


# Functions of the definition, compiled once for all formats.
quantize, rescale, rounded = (
    jax.jit(function)
    for function in (reference.quantize_activations, reference.rescale, reference.rounded_product)
)


def x_sums(q: jax.Array, w: PackedArray) -> np.ndarray:
    """[G, m]: the sums of int8 codes [m, k] over each scale group of w."""
    return np.asarray(q).reshape(len(q), w.groups, -1).sum(axis=-1, dtype=np.int32).T


def defined(xs: list[jax.Array], ws: list[PackedArray], codes: list[np.ndarray]) -> list[list[np.ndarray]]:
    """[[x times w for w in ws] for x in xs] by the definition, from exact sums; xs of a dtype at once."""
    rows: dict[str, list[np.ndarray]] = {}
    for dtype in {x.dtype.name for x in xs}:
        x = jnp.concatenate([x for x in xs if x.dtype.name == dtype])
        q, scale = (x, None) if dtype == "int8" else quantize(x)
        products = [
            rescale(exact(np.asarray(q), c, w.groups).astype(np.int32), w.scale, w.minimum, x_sums(q, w))
            for w, c in zip(ws, codes, strict=True)
        ]
        rows[dtype] = [np.asarray(y if scale is None else rounded(y, scale)) for y in products]
    results = []
    for x in xs:
        results.append([y[: len(x)] for y in rows[x.dtype.name]])
        rows[x.dtype.name] = [y[len(x) :] for y in rows[x.dtype.name]]
    return results


@pytest.mark.extended(after=4 * len(FORMATS))
@built
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("n", "k", "groups"), SHAPES)
def test_every_instruction_set_is_exact(make_packed, format: str, n: int, k: int, groups: int) -> None:
    codes, w = make_packed(format, n, k, groups)
    random = np.random.default_rng(1)
    xs = [random.integers(-128, 128, (m, k), np.int8) for m in ROWS]
    for x in xs:
        x[len(x) // 2] = random.choice(np.array([-128, 127], np.int8), k)
    expected = [exact(x, codes, groups) for x in xs]
    for isa, sums in on_every_isa(cpu.integer_matmul, xs, w).items():
        for m, got, wanted in zip(ROWS, sums, expected, strict=True):
            assert (got.dtype, got.shape) == (np.int32, (groups, m, n))
            np.testing.assert_array_equal(got, wanted, err_msg=f"{isa}, m={m}")


@pytest.mark.extended(after=len(FORMATS))
@pytest.mark.optimized
@built
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES)
@pytest.mark.parametrize(
    (
        "n",
        "k",
        "groups",
    ),  # one group; groups of 32, 64 and 128; more inputs than a tile; more inputs in a group
    [(37, 100, 1), (100, 640, 20), (65, 1024, 32), (33, 576, 9), (47, 384, 3), (50, 2592, 81), (20, 4224, 2)],
)
def test_the_fused_rescale_is_bit_identical_to_the_definition(
    make_packed, format: str, n: int, k: int, groups: int, scale_dtype: str
) -> None:
    codes, w = make_packed(format, n, k, groups, scale_dtype=scale_dtype)
    one = dataclasses.replace(w, scale=w.scale[:1], minimum=None if w.minimum is None else w.minimum[:1])
    ws = [w, one] if groups == 1 else [w]
    random, xs = np.random.default_rng(1), []
    for m in (1, 2, 3, 7, 50):  # 50 rows of 32 groups exceed one scratch tile
        xs.append(jnp.asarray(random.integers(-128, 128, (m, k), np.int8)))
        xs.append(jnp.asarray(random.normal(size=(m, k)), jnp.float32))
    expected = defined(xs, ws, [codes] * len(ws))
    for isa, products in on_every_isa(cpu.scaled_matmuls, xs, ws).items():
        for x, got, wanted in zip(xs, products, expected, strict=True):
            for i, (y, z) in enumerate(zip(got, wanted, strict=True)):
                np.testing.assert_array_equal(y, z, err_msg=f"{isa}, matrix {i}, {x.dtype}[{len(x)}, {k}]")


@pytest.mark.optimized
@built
@pytest.mark.parametrize(("n", "k", "groups"), [(1, 1, 1), (37, 100, 1), (100, 640, 20), (33, 2049, 1)])
def test_signs_times_signs_count_bits(make_packed, n: int, k: int, groups: int) -> None:
    codes, w = make_packed("binary", n, k, groups)
    other_codes, other = make_packed("ternary2", n, k, groups)  # for comparison, signs as ordinary codes
    rows = (1, 3, 4, 5, 9)
    xs = [jnp.asarray(np.random.default_rng(m).choice(np.array([-1, 1], np.int8), (m, k))) for m in rows]
    expected = defined(xs, [w, other], [codes, other_codes])
    product = partial(cpu.scaled_matmuls, activation_bits=1)
    for ws in ([w], [w, other]):
        for isa, products in on_every_isa(product, xs, ws).items():
            for m, got, wanted in zip(rows, products, expected, strict=True):
                for y, z in zip(got, wanted[: len(ws)], strict=True):
                    np.testing.assert_array_equal(y, z, err_msg=f"{isa}, m={m}, {len(ws)} matrices")


@pytest.mark.optimized
@built
def test_matrices_of_different_formats_run_in_one_call(make_packed) -> None:
    x = jnp.asarray(np.random.default_rng(1).normal(size=(3, 256)), jnp.float32)
    ws = [make_packed(format, 40 + i, 256, 1 + i % 2)[1] for i, format in enumerate(FORMATS)]
    expected = jax.jit(lambda x, ws: [reference.scaled_matmuls(x, [w])[0] for w in ws])(x, ws)
    for isa, (products,) in on_every_isa(cpu.scaled_matmuls, [x], ws).items():
        for w, got, wanted in zip(ws, products, expected, strict=True):
            np.testing.assert_array_equal(got, wanted, err_msg=f"{isa}, {w.format}")


@pytest.mark.optimized
@built
def test_every_float16_scale_is_the_same_float32() -> None:
    """Subnormal numbers, which XLA's threads would flush if they were float32, infinity and NaN included."""
    halves = np.arange(2**16, dtype=np.uint16).view(np.float16)[:, None]
    sound = pack(np.ones((2**16, 4), np.int8), np.ones_like(halves), "int4")
    w = dataclasses.replace(sound, scale=jnp.asarray(halves))
    x = jnp.asarray([[1, 0, 0, 0]], jnp.int8)
    for isa, ((y,),) in on_every_isa(cpu.scaled_matmuls, [x], [w]).items():
        np.testing.assert_array_equal(np.asarray(y)[0], halves[:, 0].astype(np.float32), err_msg=isa)
    y = reference.scaled_matmuls(x, [w])[0]
    np.testing.assert_array_equal(np.asarray(y)[0], halves[:, 0].astype(np.float32))


@pytest.mark.optimized
@built
@pytest.mark.extended(after=1)
@pytest.mark.slow(after=3)
@pytest.mark.parametrize("format", FORMATS)
def test_16_bit_inputs_are_bit_identical_to_the_definition(make_packed, format: str) -> None:
    random = np.random.default_rng(3)
    shapes = [(37, 100, 1), (50, 288, 9), (20, 4224, 2)]
    for n, k, groups in shapes:
        _, w = make_packed(format, n, k, groups, scale_dtype="float16")
        _, other = make_packed("int8", 21, k, groups)  # of one call, with its own padding
        xs = [jnp.asarray(random.normal(size=(m, k)), jnp.float32) for m in (1, 2, 7, 50)]
        xs += [reference.quantize_activations(x, 16)[0] for x in xs[:2]]
        expected = jax.jit(lambda xs, ws: [reference.matmuls_of_digits(x, ws) for x in xs])(xs, [w, other])
        product = partial(cpu.scaled_matmuls, activation_bits=16)
        for isa, products in on_every_isa(product, xs, [w, other]).items():
            for x, got, wanted in zip(xs, products, expected, strict=True):
                for y, z in zip(got, wanted, strict=True):
                    np.testing.assert_array_equal(y, z, err_msg=f"{isa}, {x.dtype}[{len(x)}, {k}]")


@pytest.mark.optimized
@built
@pytest.mark.parametrize(
    ("bits", "definition"), [(8, reference.scaled_matmuls), (16, reference.matmuls_of_digits)]
)
def test_activations_are_quantized_like_the_definition(make_packed, bits: int, definition) -> None:
    _, w = make_packed("int8", 16, 96)
    random = np.random.default_rng(2)
    rows = random.normal(size=(9, 96)).astype(np.float32)
    rows[1], rows[2] = 0, 1e-7  # below the smallest absmax
    rows[3, 5], rows[4, 6], rows[5, 7] = np.inf, np.nan, -np.inf
    rows[6] *= 1e30
    rows[7] = np.arange(96) - 47.5  # halves: scaling by 127 / absmax is inexact here, exact in the next row
    rows[8] = np.concatenate([[127], np.arange(95) - 46.5])
    x = jnp.asarray(rows)
    np.testing.assert_array_equal(
        cpu.scaled_matmuls(x, [w], activation_bits=bits)[0], jax.jit(definition)(x, [w])[0]
    )


@pytest.mark.extended(after=len(FORMATS))
@built
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("k", [4096, 0])
def test_the_largest_sums_do_not_overflow(format: str, k: int) -> None:
    values, k = FORMATS[format].values, k or FORMATS[format].max_inputs
    extremes = [max(values), min(values)]
    codes = np.repeat(np.array(extremes, np.int8)[:, None], k, axis=1)
    one = np.ones((1, 1), np.float32)
    w = pack(codes, one, format, minimum=one if FORMATS[format].has_minimum else None)
    inputs = [(value, m) for value in (-128, 127) for m in (1, 5, 12)]
    xs = [jnp.asarray(np.full((m, k), value, np.int8)) for value, m in inputs]
    for isa, sums in on_every_isa(cpu.integer_matmul, xs, w).items():
        for (value, m), got in zip(inputs, sums, strict=True):
            wanted = np.broadcast_to([value * k * code for code in extremes], (1, m, 2))
            np.testing.assert_array_equal(got, wanted, err_msg=f"{isa}, {m} rows of {value}")


@built
@pytest.mark.parametrize("product", [cpu.integer_matmul, reference.integer_matmul])
def test_integer_sums_under_vmap(make_packed, product) -> None:
    codes, w = make_packed("ternary2", 20, 64, 2)
    x = np.random.default_rng(0).integers(-128, 128, (3, 4, 64), np.int8)
    sums = jax.vmap(product, (0, None))(jnp.asarray(x), w)
    np.testing.assert_array_equal(sums, np.stack([exact(rows, codes, 2) for rows in x]))


@built
@pytest.mark.parametrize("product", [cpu.integer_matmul, reference.integer_matmul])
@pytest.mark.parametrize("groups", [1, 2])
def test_no_rows_give_no_rows(make_packed, product, groups: int) -> None:
    _, w = make_packed("binary", 16, 64, groups)
    assert product(jnp.zeros((0, 64), jnp.int8), w).shape == (groups, 0, 16)


@built
@pytest.mark.parametrize(
    ("x", "codes", "sums", "attributes", "message"),
    [
        ((2, 32), (1, 1, 64), (1, 2, 16), {"isa": "mmx"}, "isa=mmx is not available; expected one of scalar"),
        ((2, 32), (1, 1, 64), (1, 2, 16), {"format": np.int64(9)}, "format=9; expected a number below 6"),
        ((2, 32), (1, 1, 64), (1, 3, 16), {}, r"expected y\[groups, 2, n\]; got y\[1, 3, 16\]"),
        (
            (2, 0),
            (1, 0, 64),
            (1, 2, 16),
            {},
            r"at least one scale group, output and input; got 1 groups of \[16, 0\]",
        ),
        (
            (2, 32),
            (1, 2, 64),
            (1, 2, 16),
            {},
            r"a matrix \[16, 32\] of this format has codes \[1, 1, 64\]; got \[1, 2, 64\]",
        ),
        ((2, 32), (1, 1, 64), (1, 2, 17), {}, r"has codes \[2, 1, 64\]; got \[1, 1, 64\]"),
        ((2, 32), (1, 1, 32), (1, 2, 16), {}, r"got \[1, 1, 32\]"),
        ((2, 96), (1, 3, 64), (2, 2, 16), {}, "2 groups of k=96; expected groups of a multiple of 32"),
        ((1, 2**18 + 32), (1, 2**13 + 1, 64), (1, 1, 16), {}, "overflows int32; expected at most 262144"),
    ],
)
def test_the_custom_call_rejects_invalid_operands(x, codes, sums, attributes: dict, message: str) -> None:
    out = jax.ShapeDtypeStruct(sums, jnp.int32)
    call = jax.ffi.ffi_call("bitnet_kernels_integer_matmul", out)
    attributes = {"format": np.int64(0), "isa": "scalar"} | attributes
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        call(jnp.zeros(x, jnp.int8), jnp.zeros(codes, jnp.uint8), **attributes)


@built
@pytest.mark.parametrize(
    ("scale", "y", "message"),
    [
        ((17, 1), (2, 16), r"expected scale\[1, 1\] or scale\[16, groups\]; got scale\[17, 1\]"),
        ((16, 0), (2, 16), "at least one scale group"),
        ((1, 2), (2, 16), r"got scale\[1, 2\]"),
        ((16,), (2, 16), "expected scales as float32 or float16"),
        ((1, 1), (3, 16), r"expected y\[2, n\]; got y\[3, 16\]"),
        ((1, 1), (2, 17), r"has codes \[2, 2, 64\]; got \[1, 2, 64\]"),
    ],
)
def test_the_scaled_custom_call_rejects_invalid_operands(scale, y, message: str) -> None:
    call = jax.ffi.ffi_call("bitnet_kernels_scaled_matmul", (jax.ShapeDtypeStruct(y, jnp.float32),))
    x, codes = jnp.zeros((2, 64), jnp.int8), jnp.zeros((1, 2, 64), jnp.uint8)
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        call(
            x,
            codes,
            jnp.ones(scale),
            formats=np.zeros(1, np.int64),
            activation_bits=np.int64(8),
            isa="scalar",
        )


@built
@pytest.mark.parametrize(
    ("leaves", "message"),
    [
        (
            (jnp.ones((16, 1)),),
            r"expected codes, scale and, for uint4, minimum of each of 1 formats.*got 2 arrays",
        ),
        (
            (jnp.ones((16, 1)), jnp.ones((1, 1))),
            r"expected minimum\[16, 1\], as the scale; got minimum\[1, 1\]",
        ),
        ((jnp.ones((16, 1)), jnp.ones((16, 1), jnp.int32)), "expected scales as float32 or float16"),
    ],
)
def test_the_scaled_custom_call_rejects_an_invalid_minimum(leaves: tuple, message: str) -> None:
    call = jax.ffi.ffi_call("bitnet_kernels_scaled_matmul", (jax.ShapeDtypeStruct((2, 16), jnp.float32),))
    operands = jnp.zeros((2, 64), jnp.int8), jnp.zeros((1, 8, 64), jnp.uint8), *leaves
    uint4 = np.array([list(FORMATS).index("uint4")], np.int64)
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        call(*operands, formats=uint4, activation_bits=np.int64(8), isa="scalar")


@built
@pytest.mark.parametrize(
    ("x", "codes", "message"),
    [(jnp.zeros((2, 32)), jnp.zeros((1, 1, 64), jnp.uint8), "S8"), (jnp.zeros(32, jnp.int8), None, "rank")],
)
def test_the_custom_call_rejects_wrong_types(x, codes, message: str) -> None:
    codes = jnp.zeros((1, 1, 64), jnp.uint8) if codes is None else codes
    call = jax.ffi.ffi_call("bitnet_kernels_integer_matmul", jax.ShapeDtypeStruct((1, 2, 16), jnp.int32))
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        call(x, codes, format=np.int64(0), isa="scalar")


# The first line follows the environment at process start, the others its later values.
FORCED = """
import os, sys
import numpy as np, jax.numpy as jnp
from bitnet_kernels import choose_implementation, cpu, pack, packed_matmul
random = np.random.default_rng(0)
codes = random.integers(-1, 2, (70, 200), np.int8)
w = pack(codes, np.full((1, 1), 0.5, np.float32), "ternary2")
x = jnp.asarray(random.normal(size=(9, 200)), jnp.float32)
expected = packed_matmul(x, w, implementation="reference")
for isa in [os.environ["BITNET_KERNELS_ISA"], *sys.argv[1:]]:
    os.environ["BITNET_KERNELS_ISA"] = isa
    choice = choose_implementation(w)
    same = (packed_matmul(x, w) == expected).all()
    print(cpu.isa(), choice.name, choice.isa, bool(same), "forced" in choice.reason)
"""


@built
def test_the_environment_variable_forces_an_instruction_set() -> None:
    environment = os.environ | {"BITNET_KERNELS_ISA": ISAS[0], "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", FORCED, *ISAS]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    lines = [line.split() for line in result.stdout.splitlines()]
    assert lines == [[isa, "cpu", isa, "True", "True"] for isa in (ISAS[0], *ISAS)], result.stderr


@built
def test_an_unsupported_instruction_set_is_an_error(make_packed, monkeypatch: pytest.MonkeyPatch) -> None:
    _, w = make_packed("binary", 16, 32)
    monkeypatch.setenv("BITNET_KERNELS_ISA", "avx1024")
    message = (
        f"BITNET_KERNELS_ISA='avx1024' is not available on this machine; expected one of {', '.join(ISAS)}"
    )
    with pytest.raises(ValueError, match=message):
        cpu.isa()
    with pytest.raises(ValueError, match=message):
        packed_matmul(jnp.ones((1, 32)), w)
    monkeypatch.setenv("BITNET_KERNELS_ISA", "scalar")
    assert cpu.isa() == "scalar"
    monkeypatch.setenv("BITNET_KERNELS_ISA", "")
    assert cpu.isa() == ISAS[-1]


@pytest.fixture
def library_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A path for a library other than the built one."""
    path = tmp_path / "_cpu.so"
    monkeypatch.setattr(cpu, "LIBRARY", path)
    cpu.warn_once.cache_clear()
    return path


def test_without_the_library_packed_matmul_warns_once_and_uses_xla(make_packed, library_path: Path) -> None:
    _, w = make_packed("ternary2", 20, 40)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 40)), jnp.float32)
    with pytest.warns(RuntimeWarning, match="runs on XLA.*was not built.*install again to build it"):
        y = packed_matmul(x, w)
    np.testing.assert_array_equal(packed_matmul(x, w), y)  # a second warning would be an error here
    np.testing.assert_array_equal(packed_matmul(x, w, implementation="reference"), y)
    with pytest.raises(NotImplementedError, match="implementation='cpu' cannot be used.*was not built"):
        packed_matmul(x, w, implementation="cpu")
    choice = matmul.choose_implementation(w)
    assert (choice.name, choice.isa) == ("reference", None)
    assert "was not built" in choice.reason
    assert cpu.available_isas() == ()
    with pytest.raises(RuntimeError, match="not available.*was not built"):
        cpu.isa()


def test_a_file_that_is_not_a_library_is_reported(library_path: Path) -> None:
    library_path.write_bytes(b"not a shared object")
    assert "cannot be loaded" in str(cpu.unavailable())


def test_a_library_of_another_version_is_reported(library_path: Path) -> None:
    library_path.symlink_to(_ctypes.__file__)  # a library with other symbols
    assert "is from another version" in str(cpu.unavailable())


@built
def test_headers_newer_than_the_runtime_are_rejected(
    library_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library_path.symlink_to(Path(cpu.__file__).parent / "_cpu.so")
    header = tmp_path / "xla" / "ffi" / "api" / "c_api.h"
    header.parent.mkdir(parents=True)
    header.write_text("#define XLA_FFI_API_MAJOR 0\n#define XLA_FFI_API_MINOR 1\n")
    monkeypatch.setattr(jax.ffi, "include_dir", lambda: str(tmp_path))
    assert "this jaxlib has 0.1; build it with the oldest supported jaxlib" in str(cpu.unavailable())


def test_too_many_inputs_per_group_are_left_to_xla() -> None:
    k = FORMATS["binary"].max_inputs + 1
    w = pack(np.ones((1, k), np.int8), np.ones((1, 1), np.float32), "binary")
    choice = matmul.choose_implementation(w, "cpu")
    assert choice.name == "reference"
    assert "exceed the 262144" in choice.reason
    x = jnp.full((1, k), -128, jnp.int8)
    assert reference.integer_matmul(x, w).tolist() == [[[-128 * k]]]
    with pytest.raises(NotImplementedError, match="exceed the 262144"):
        packed_matmul(x, w, implementation="cpu")
