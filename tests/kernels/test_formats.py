"""Codecs: round trips, the documented bit order, padding, invalid input."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitnet_kernels import FORMATS, dequantize, pack, packed_rows, relayout, unpack, validate

ONE = np.ones((1, 1), np.float32)


def minimum_of(format: str) -> np.ndarray | None:
    """Of a matrix whose scale is ONE."""
    return ONE if FORMATS[format].has_minimum else None


LAYOUTS_OF = [(format, layout) for format, form in FORMATS.items() for layout in form.layouts]


@pytest.mark.extended
@settings(max_examples=40, deadline=None)  # every new shape compiles
@given(st.sampled_from(LAYOUTS_OF), st.integers(1, 40), st.integers(1, 80), st.integers(0, 2**32 - 1))
def test_round_trip(names: tuple[str, str], n: int, k: int, seed: int) -> None:
    format, layout = names
    codes = np.random.default_rng(seed).choice(np.array(FORMATS[format].values, np.int8), (n, k))
    w = pack(codes, ONE, format, layout, minimum=minimum_of(format))
    validate(w)  # zero padding included
    np.testing.assert_array_equal(unpack(w), codes)
    assert unpack(w).dtype == np.int8
    for other in FORMATS[format].layouts:
        moved = relayout(w, other)
        validate(moved)
        again = pack(codes, ONE, format, other, minimum=minimum_of(format))
        np.testing.assert_array_equal(moved.codes, again.codes)


def test_ternary_bytes_match_the_layout_page() -> None:
    codes = np.full((18, 17), -1, np.int8)  # -1 is the field 0
    #             s=0            s=1            s=2            s=3
    codes[0] = [-1, 0, 1, 0, 1, 1, 0, -1, 0, -1, 1, 1, 1, 0, -1, 0, 1]
    codes[1, 15] = 1
    codes[17, 6] = 0
    packed = np.asarray(pack(codes, ONE, "ternary2").codes)
    assert packed.shape == (2, 2, 64)
    # byte 4 r + j, field s in bits 2 s, input 4 s + j of the block
    assert packed[0, 0, :4].tolist() == [0b10_01_10_00, 0b01_00_10_01, 0b00_10_01_10, 0b01_10_00_01]
    assert packed[0, 0, 4:8].tolist() == [0, 0, 0, 0b10_00_00_00]
    assert packed[0, 1, :4].tolist() == [0b10, 0, 0, 0]
    assert packed[1, 0, 4:8].tolist() == [0, 0, 0b00_00_01_00, 0]
    assert packed.sum(dtype=int) == sum([0x98, 0x49, 0x26, 0x61, 0x80, 0x02, 0x04])


def test_binary_bytes_match_the_layout_page() -> None:
    codes = np.full((17, 33), -1, np.int8)
    codes[0, [0, 5, 10, 31]] = 1  # fields 0, 1, 2, 7 of bytes 0, 1, 2, 3
    codes[15, 28] = 1  # field 7 of byte 0 of the last row of the panel
    codes[16, 32] = 1  # second panel, second block
    packed = np.asarray(pack(codes, ONE, "binary").codes)
    assert packed.shape == (2, 2, 64)
    assert packed[0, 0, :4].tolist() == [1 << 0, 1 << 1, 1 << 2, 1 << 7]
    assert packed[0, 0, 60] == 1 << 7
    assert packed[1, 1, 0] == 1
    assert np.count_nonzero(packed) == 6


def test_ternary5_bytes_match_the_layout_page() -> None:
    codes = np.full((2, 64), -1, np.int8)
    codes[0, [0, 5, 10, 19]] = [1, 0, 1, 1]  # fields 0, 1, 2, 4 of bytes 0, 1, 2, 3
    codes[1, 32] = 0  # a group of 32 inputs is padded to two blocks of 20
    packed = np.asarray(pack(codes, np.ones((2, 2), np.float32), "ternary5").codes)
    assert packed.shape == (1, 4, 64)
    assert packed[0, 0, :4].tolist() == [2, 3, 2 * 9, 2 * 81]
    assert packed[0, 2, 4] == 1
    assert np.count_nonzero(packed) == 5


def test_int4_uint4_and_int8_bytes_match_the_layout_page() -> None:
    codes = np.full((1, 9), -8, np.int8)
    codes[0, [0, 5, 8]] = [7, -7, 3]  # fields 0 and 1 of bytes 0 and 1; the second block
    packed = np.asarray(pack(codes, ONE, "int4").codes)
    assert packed.shape == (1, 2, 64)
    assert packed[0, :, :4].tolist() == [[15, 1 << 4, 0, 0], [11, 0, 0, 0]]
    packed = np.asarray(pack((codes + 8).astype(np.int8), ONE, "uint4", minimum=ONE).codes)
    assert packed[0, :, :4].tolist() == [[15, 1 << 4, 0, 0], [11, 0, 0, 0]]
    packed = np.asarray(pack(np.array([[-128, 0, 127, -1, 5]], np.int8), ONE, "int8").codes)
    assert packed[0, :, :4].tolist() == [[0, 128, 255, 127], [133, 0, 0, 0]]


@pytest.mark.parametrize("format", FORMATS)
def test_packing_under_jit_and_vmap(make_packed, format: str) -> None:
    codes = np.stack([make_packed(format, 20, 50, seed=seed)[0] for seed in range(3)])
    stacked = jax.jit(jax.vmap(lambda c: pack(c, jnp.ones((1, 1)), format, minimum=minimum_of(format))))(
        codes
    )
    np.testing.assert_array_equal(jax.vmap(unpack)(stacked), codes)


def test_column_bytes_match_the_invariants() -> None:
    codes = np.ones((3, 300), np.int8)
    codes[1, 4:8] = [-1, 0, 1, -1]
    packed = np.asarray(pack(codes, ONE, "ternary2", "column").codes)
    assert packed.shape == (128, 3)
    assert packed[0].tolist() == [0b01_01_01_01] * 3
    assert packed[1].tolist() == [0b01_01_01_01, 0b11_01_00_11, 0b01_01_01_01]
    codes[codes == 0] = 1
    codes[2, [64, 64 + 4 * 5 + 3, 64 + 32, 64 + 63]] = -1
    packed = np.asarray(pack(codes, ONE, "binary", "column").codes)
    assert packed.shape == (64, 3)
    assert packed[8:16, 2].tolist() == [0b11, 0, 0, 0, 0, 1 << 6, 0, 1 << 7]


def test_plane_bytes_match_the_invariants() -> None:
    codes = np.full((130, 1100), -1, np.int8)
    codes[129, [0, 128 + 5, 512 + 3 * 128 + 127, 1024]] = [1, 0, 1, 1]
    packed = np.asarray(pack(codes, ONE, "ternary2", "plane").codes)
    assert packed.shape == (256, 3 * 128)
    assert {i: packed[129, i] for i in packed[129].nonzero()[0]} == {0: 2, 5: 1 << 2, 255: 2 << 6, 256: 2}
    codes[codes == 0] = 1
    packed = np.asarray(pack(codes, ONE, "binary", "plane").codes)
    assert packed.shape == (256, 3 * 64)
    assert {i: packed[129, i] for i in packed[129].nonzero()[0]} == {0: 1, 5: 1 << 2, 127: 1 << 7, 128: 1}


@pytest.mark.parametrize(
    ("codes", "scale", "format", "layout", "message"),
    [
        (np.ones((2, 2), np.int8), ONE, "ternary", "panel16", "format='ternary' is unknown"),
        (np.ones((2, 2), np.int8), ONE, "binary", "panel8", "layout='panel8' of binary; expected one of"),
        (
            np.ones((2, 2), np.float32),
            ONE,
            "binary",
            "panel16",
            r"codes are float32\[2, 2\]; expected int8\[n, k\]",
        ),
        (np.ones((2,), np.int8), ONE, "binary", "panel16", r"codes are int8\[2\]"),
        (np.ones((0, 2), np.int8), ONE, "binary", "panel16", r"codes are int8\[0, 2\]"),
        (np.zeros((2, 2), np.int8), ONE, "binary", "panel16", r"values \[0\]; binary can hold \[-1, 1\]"),
        (
            np.full((2, 2), 2, np.int8),
            ONE,
            "ternary2",
            "panel16",
            r"values \[2\]; ternary2 can hold \[-1, 0, 1\]",
        ),
        (np.ones((2, 2), np.int8), np.ones((2,), np.float32), "binary", "panel16", r"scale has shape \(2,\)"),
        (np.ones((2, 2), np.int8), np.ones((1, 1), np.int32), "binary", "panel16", "scale is int32"),
    ],
)
def test_errors_name_the_invalid_input(codes, scale, format: str, layout: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pack(codes, scale, format, layout)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize(("format", "layout"), LAYOUTS_OF)
def test_rows_of_a_packed_matrix(format: str, layout: str, groups: int) -> None:
    rng = np.random.default_rng(0)
    codes = rng.choice(np.array(FORMATS[format].values, np.int8), (37, 96))
    scale, minimum = rng.uniform(0.1, 2, (2, 37, groups)).astype(np.float32)
    w = pack(codes, scale, format, layout, minimum=minimum if format == "uint4" else None)
    indices = np.array([[0, 36, 5], [16, 15, 36]])
    rows = jax.jit(packed_rows)(w, indices)
    np.testing.assert_array_equal(rows, np.asarray(dequantize(w))[indices])
    assert np.isnan(packed_rows(w, np.array([-1, 37]))).all()
    with pytest.raises(ValueError, match="indices is float32; expected an integer type"):
        packed_rows(w, np.ones(2, np.float32))
