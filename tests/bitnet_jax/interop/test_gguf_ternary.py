"""Codes and scales of the ternary GGUF types, by definition and against the quantizers' vectors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bitnet_jax.interop.gguf_ternary import I2S_LAYOUTS, Ternary, decode_ternary, encode_ternary

SCALE = np.full((1, 1), 0.625, np.float32)


def codes(n: int, k: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(-1, 2, (n, k)).astype(np.int8)


def by_definition(data: np.ndarray, shape: tuple[int, int], layout: str) -> np.ndarray:
    """The code of each weight of an i2_s tensor, one at a time."""
    n, k = shape
    found = np.zeros(n * k, np.int8)
    for index in range(n * k):
        if layout == "rows4":
            byte, part = index // k // 4 * k + index % k, index // k % 4
        else:
            block = {"128x32": 128, "arm-64x16": 64}[layout]
            width = block // 4
            byte, part = index // block * width + index % width, index % block // width
        found[index] = (int(data[byte]) >> (6 - 2 * part) & 3) - 1
    return found.reshape(n, k)


@pytest.mark.parametrize("layout", list(I2S_LAYOUTS))
def test_i2s_by_definition(layout: str) -> None:
    generator = np.random.default_rng(1)
    fields = generator.integers(0, 3, (4, 8 * 128 // 4)).astype(np.uint8)
    data = fields[0] << 6 | fields[1] << 4 | fields[2] << 2 | fields[3]
    tail = np.concatenate([np.array([0.625], "<f4").view(np.uint8), generator.integers(0, 256, 28)])
    got = decode_ternary("i2_s", np.concatenate([data, tail]).astype(np.uint8), (8, 128), layout)
    np.testing.assert_array_equal(got.codes, by_definition(data, (8, 128), layout))
    np.testing.assert_array_equal(got.scale, SCALE)


# The codes -1, 0, 1, -1, 0, 1, ... with the scale 1, as the package gguf and (i2_s) the definition above give them.
KNOWN = {
    "i2_s": "244992" * 21 + "24" + "0000803f" + "00" * 28,
    "TQ1_0": "456ccf" * 10 + "456c" + "94bb31" * 5 + "94" + "3092bb30" + "003c",
    "TQ2_0": "186186" * 21 + "18" + "003c",
}


@pytest.mark.parametrize("name", list(KNOWN))
def test_codes_return_from_bytes(name: str) -> None:
    for seed in range(3):
        matrix = Ternary(codes(6, 512, seed), SCALE)
        got = decode_ternary(name, encode_ternary(name, matrix), (6, 512))
        np.testing.assert_array_equal(got.codes, matrix.codes)
        assert (got.scale == 0.625).all()
        assert got.scale.shape == ((1, 1) if name == "i2_s" else (6, 2))


@pytest.mark.parametrize("name", list(KNOWN))
def test_known_bytes(name: str) -> None:
    data = encode_ternary(
        name, Ternary(np.resize(np.array([-1, 0, 1], np.int8), (1, 256)), np.ones((1, 1), np.float32))
    )
    assert data.tobytes().hex() == KNOWN[name]


def test_scales_of_rows_and_groups_are_kept_per_block() -> None:
    scale = np.arange(1, 5, dtype=np.float32).reshape(2, 2)
    matrix = codes(2, 1024)
    matrix[0, :256] = 0
    got = decode_ternary("TQ2_0", encode_ternary("TQ2_0", Ternary(matrix, scale)), (2, 1024))
    np.testing.assert_array_equal(got.scale, [[0, 1, 2, 2], [3, 3, 4, 4]])  # a block of zeros has the scale 0
    rows = decode_ternary("TQ1_0", encode_ternary("TQ1_0", Ternary(matrix, scale[:, :1])), (2, 1024))
    np.testing.assert_array_equal(rows.scale, [[0, 1, 1, 1], [3, 3, 3, 3]])


def test_vectors_of_the_quantizer(oracles: Path) -> None:
    with np.load(oracles / "gguf" / "i2s_vectors.npz") as vectors:
        for case in range(5):
            expected, scale = vectors[f"case{case}/ternary"], vectors[f"case{case}/scale"]
            for layout in I2S_LAYOUTS:
                stored = vectors[f"case{case}/bytes_{layout.replace('-', '_')}"]
                data = np.concatenate(
                    [stored, np.full(28, 255, np.uint8)]
                )  # the vectors leave the filler out
                got = decode_ternary("i2_s", data, expected.shape, layout)
                np.testing.assert_array_equal(got.codes, expected)
                assert got.scale == scale
            written = encode_ternary("i2_s", Ternary(expected, scale.reshape(1, 1)))
            np.testing.assert_array_equal(written[:-28], vectors[f"case{case}/bytes_128x32"])
            assert not written[-28:].any()


def test_what_is_refused() -> None:
    data = encode_ternary("i2_s", Ternary(codes(4, 128), SCALE))
    with pytest.raises(ValueError, match="i2s_layout='arm', expected one of 128x32, arm-64x16, rows4"):
        decode_ternary("i2_s", data, (4, 128), "arm")
    data[0] = 0xFF
    with pytest.raises(ValueError, match="a code is 3"):
        decode_ternary("i2_s", data, (4, 128))
    with pytest.raises(ValueError, match="a multiple of 4 rows"):
        decode_ternary("i2_s", encode_ternary("i2_s", Ternary(codes(2, 128), SCALE)), (2, 128), "rows4")
    with pytest.raises(ValueError, match="2 scales, expected 1 in the type i2_s; choose TQ2_0"):
        encode_ternary("i2_s", Ternary(codes(2, 128), np.ones((2, 1), np.float32)))
    with pytest.raises(ValueError, match="4 scales for 512 inputs, expected groups of a multiple of 256"):
        encode_ternary("TQ2_0", Ternary(codes(2, 512), np.ones((2, 4), np.float32)))
    with pytest.raises(ValueError, match="65504"):
        encode_ternary("TQ2_0", Ternary(codes(2, 512), np.full((1, 1), 1e6, np.float32)))
