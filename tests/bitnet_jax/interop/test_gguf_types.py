"""Tensor types of GGUF files against vectors of other people's quantizers, exactly, both ways."""

from __future__ import annotations

import builtins
import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

from bitnet_jax.interop.gguf_types import NUMBERS, READ_ONLY, TYPES, decode, encode, named_type, tensor_type


def test_numbers_and_sizes_are_those_of_the_package() -> None:
    ours = {name: (number, TYPES[number].block, TYPES[number].bytes) for name, number in NUMBERS.items()}
    theirs = {kind.name: (int(kind), *GGML_QUANT_SIZES[kind]) for kind in GGMLQuantizationType}
    newer = {"i2_s": (36, 128, 32), "Q2_0": (42, 64, 18), "Q1_0": (41, 128, 18)}
    assert ours == {name: theirs[name] for name in ours if name not in newer} | newer
    unsupported = {"Q8_1", "Q8_K", "I8", "I16", "I32", "I64", "F64", "MXFP4", "NVFP4"}
    assert set(theirs) - set(ours) == unsupported


@pytest.mark.parametrize("name", [name for name in NUMBERS if name not in ("i2_s", "Q1_0", "Q2_0")])
def test_random_bytes_decode_as_in_the_package(name: str) -> None:
    kind, shape = named_type(name), (3, 512)
    data = np.random.default_rng(0).integers(0, 256, kind.nbytes(shape), np.uint8)
    got = decode(kind, data, shape)
    assert (got.dtype, got.shape) == (np.float32, shape)
    rows = data.reshape(3, -1)
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(got, quants.dequantize(rows, GGMLQuantizationType[name]))


@pytest.mark.parametrize("name", [name for name in NUMBERS if name not in ("i2_s", *READ_ONLY)])
def test_floats_encode_as_in_the_package(name: str) -> None:
    kind, values = named_type(name), np.random.default_rng(0).normal(size=(3, 512)).astype(np.float32)
    expected = quants.quantize(values, GGMLQuantizationType[name])
    np.testing.assert_array_equal(encode(kind, values), expected.reshape(-1).view(np.uint8))


@pytest.mark.parametrize("name", ["F32", "F16", "BF16", "TQ1_0", "TQ2_0", "i2_s"])
def test_what_is_decoded_encodes_to_the_same_bytes(name: str) -> None:
    kind = named_type(name)
    codes = np.random.default_rng(0).integers(-1, 2, (4, 256))
    values = (codes * np.float32(0.375)).astype(np.float32)
    data = encode(kind, values)
    np.testing.assert_array_equal(decode(kind, data, values.shape), values)
    np.testing.assert_array_equal(encode(kind, decode(kind, data, values.shape)), data)


def test_one_and_two_bits_by_definition() -> None:
    """Q1_0: float16 d, bit j (lowest first) is d or -d. Q2_0: float16 d, pair j is -d, 0, d or 2 d."""
    one = np.concatenate([np.array([0.5], "<f2").view(np.uint8), [0b00000101], np.zeros(15)]).astype(np.uint8)
    expected = np.full(128, -0.5)
    expected[[0, 2]] = 0.5
    np.testing.assert_array_equal(decode(named_type("Q1_0"), one, (1, 128))[0], expected)
    two = np.concatenate([np.array([0.5], "<f2").view(np.uint8), [0b11100100], np.full(15, 0b01010101)])
    expected = np.concatenate([[-0.5, 0, 0.5, 1], np.zeros(60)])
    np.testing.assert_array_equal(decode(named_type("Q2_0"), two.astype(np.uint8), (1, 64))[0], expected)


def test_vectors_of_the_quantizers(oracles: Path) -> None:
    with np.load(oracles / "gguf" / "tq_vectors.npz") as vectors:
        for name in ("TQ1_0", "TQ2_0"):
            kind, key = named_type(name), name.lower()
            matrices = [path.removesuffix("/w") for path in vectors if path.endswith("/w")]
            assert len(matrices) == 8
            for matrix in matrices:
                data, decoded = vectors[f"{matrix}/{key}_bytes"], vectors[f"{matrix}/{key}_decoded"]
                np.testing.assert_array_equal(decode(kind, data.reshape(-1), decoded.shape), decoded, matrix)
                np.testing.assert_array_equal(encode(kind, vectors[f"{matrix}/w"]), data.reshape(-1), matrix)
            decoded = vectors[f"random_{key}_decoded"]
            got = decode(kind, vectors[f"random_{key}_bytes"].reshape(-1), decoded.shape)
            np.testing.assert_array_equal(got, decoded)


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("F16", [[1e6]], "expected at most 65504"),
        ("TQ2_0", [[1e6] * 256], "expected at most 65504"),
        ("F32", [[math.nan]], "NaN or infinity"),
        ("i2_s", [[0.5, 0.25] * 64], "values other than 0 and one magnitude"),
        ("TQ1_0", [[0.0] * 255], "a multiple of 256 in the type TQ1_0"),
        ("Q4_0", [[0.0] * 16], "a multiple of 32 in the type Q4_0"),
        ("Q4_K", [[0.0] * 256], "Q4_K can only be read; expected one of F32, F16"),
        ("Q2_0", [[0.0] * 64], "Q2_0 can only be read"),
    ],
)
def test_what_is_not_encoded(name: str, values: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encode(named_type(name), np.array(values, np.float32))


def test_unknown_types_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="the tensor type 'q9', expected one of F32, F16"):
        named_type("q9")
    for number, name in {
        38: "TL1",
        39: "MXFP4",
        40: "NVFP4",
        142: "PQ2_0",
        143: "PTQ1_0",
        77: "number 77",
    }.items():
        with pytest.raises(ValueError, match=rf"got the tensor type {name}.*; "):
            tensor_type(number)


def test_without_the_package_only_its_types_need_it(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def absent(name: str, *args: Any) -> Any:
        if name == gguf.__name__:
            raise ImportError(name)
        return real(name, *args)

    monkeypatch.setattr(builtins, "__import__", absent)
    decode(named_type("TQ2_0"), np.zeros(66, np.uint8), (1, 256))
    with pytest.raises(ValueError, match="pip install gguf"):
        decode(named_type("Q8_0"), np.zeros(34, np.uint8), (1, 32))
    with pytest.raises(ValueError, match="pip install gguf"):
        encode(named_type("Q8_0"), np.zeros((1, 32), np.float32))
