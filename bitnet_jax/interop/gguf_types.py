"""Tensor types of GGUF files: their sizes, and their bytes <-> numbers.

A tensor [n, k] is stored row by row, each row in blocks of consecutive weights. Q4_0 to Q8_0 and the K and IQ types are
decoded by the package gguf; codes and scales of the ternary types are in gguf_ternary.py.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from bitnet_jax.interop import gguf_ternary
from bitnet_jax.interop.gguf_ternary import (
    FLOAT16_MAX,
    I2S_TAIL,
    TQ_BLOCK,
    TQ_BYTES,
    Blocks,
    Ternary,
    decode_ternary,
    encode_ternary,
    half,
)
from bitnet_jax.optional_packages import missing_package


@dataclasses.dataclass(frozen=True)
class TensorType:
    id: int
    name: str
    block: int  # weights
    bytes: int  # per block
    decode: Callable[[Blocks], np.ndarray] | None = None  # -> float32 [blocks, block]; None: the package gguf
    encode: Callable[[np.ndarray], np.ndarray] | None = (
        None  # the inverse; None: the package gguf, or READ_ONLY
    )
    tail: int = 0  # bytes of a tensor after its blocks

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Raises ValueError: rows are not whole blocks."""
        if shape[-1] % self.block:
            raise ValueError(
                f"got rows of {shape[-1]} weights, expected a multiple of {self.block} in the type {self.name}"
            )
        return math.prod(shape) // self.block * self.bytes + self.tail


def tensor_type(number: int) -> TensorType:
    """The type with this number. Raises ValueError: unknown, or known and not supported."""
    if number in TYPES:
        return TYPES[number]
    name, advice = _REFUSED.get(number, (f"number {number}", _CONVERT))
    raise ValueError(f"got the tensor type {name}, expected one of {', '.join(NUMBERS)}; {advice}")


def named_type(name: str) -> TensorType:
    """The type of this name, in any case. Raises ValueError: unknown."""
    number = next((number for known, number in NUMBERS.items() if known.lower() == name.lower()), None)
    if number is None:
        raise ValueError(f"got the tensor type {name!r}, expected one of {', '.join(NUMBERS)}")
    return TYPES[number]


def decode(
    kind: TensorType, data: np.ndarray, shape: tuple[int, ...], i2s_layout: str = "128x32"
) -> np.ndarray:
    """float32 values of the bytes of a tensor, uint8 [nbytes]; exact: no type has more precision.

    Raises:
      ValueError: codes that the type does not define, or the package gguf is needed and not installed.
    """
    if kind.name == "i2_s":
        codes, scale = decode_ternary(kind.name, data, shape, i2s_layout)
        return codes * scale
    if kind.decode is not None:
        return kind.decode(data.reshape(-1, kind.bytes)).reshape(shape)
    quants, types = _package()
    rows = data.reshape(*shape[:-1], shape[-1] // kind.block * kind.bytes)
    with np.errstate(over="ignore", invalid="ignore"):
        return quants.dequantize(rows, types[kind.name])


def encode(kind: TensorType, values: np.ndarray) -> np.ndarray:
    """uint8 [nbytes] of float32 values, rounded as the type's reference quantizer does.

    Raises:
      ValueError: rows that are not whole blocks, values out of range, values that are not ternary for i2_s, a type
        that can only be read, or the package gguf is needed and not installed.
    """
    if kind.name in READ_ONLY:
        writable = ", ".join(name for name in NUMBERS if name not in READ_ONLY)
        raise ValueError(f"the type {kind.name} can only be read; expected one of {writable}")
    kind.nbytes(values.shape)
    values = np.ascontiguousarray(values, np.float32)
    if not np.isfinite(values).all():
        raise ValueError("got NaN or infinity, expected finite values")
    if kind.name == "i2_s":
        scale = np.abs(values).max()
        if not np.isin(values, (-scale, 0, scale)).all():
            raise ValueError(f"got values other than 0 and one magnitude, which {kind.name} cannot hold")
        return encode_ternary(kind.name, Ternary(np.sign(values).astype(np.int8), scale.reshape(1, 1)))
    if kind.encode is not None:
        return kind.encode(values.reshape(-1, kind.block)).reshape(-1)
    quants, types = _package()
    return quants.quantize(values, types[kind.name]).reshape(-1).view(np.uint8)


def _scaled(codes: np.ndarray, scale: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore", invalid="ignore"):
        return codes.astype(np.float32) * scale.reshape(-1, 1)


def _decode_q1(blocks: Blocks) -> np.ndarray:
    bits = np.unpackbits(blocks[:, 2:], axis=1, bitorder="little").astype(np.int8)
    return _scaled(2 * bits - np.int8(1), half(blocks[:, :2]))


def _decode_q2(blocks: Blocks) -> np.ndarray:
    fields = blocks[:, 2:, None] >> np.array([0, 2, 4, 6], np.uint8) & np.uint8(3)  # the code 3 is +2
    return _scaled(fields.view(np.int8).reshape(-1, 64) - np.int8(1), half(blocks[:, :2]))


def _package() -> tuple[Any, Any]:
    try:
        from gguf import GGMLQuantizationType, quants
    except ImportError as error:
        raise ValueError(missing_package("gguf")) from error
    return quants, GGMLQuantizationType


def _encode_float16(values: np.ndarray) -> np.ndarray:
    if np.abs(values).max(initial=0) > FLOAT16_MAX:
        raise ValueError(f"got {np.abs(values).max()}, expected at most {FLOAT16_MAX}, the largest float16")
    return values.astype("<f2").view(np.uint8)


TERNARY = ("i2_s", "TQ1_0", "TQ2_0")
READ_ONLY = (
    "Q1_0", "Q2_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ2_XXS", "IQ2_XS", "IQ3_XXS", "IQ1_S", "IQ4_NL",
    "IQ3_S", "IQ2_S", "IQ4_XS", "IQ1_M",
)  # fmt: skip
TYPES = {
    record.id: record
    for record in (
        TensorType(
            0, "F32", 1, 4,
            decode=lambda blocks: blocks.view("<f4").astype(np.float32),
            encode=lambda values: values.astype("<f4").view(np.uint8),
        ),
        TensorType(1, "F16", 1, 2, decode=half, encode=_encode_float16),
        TensorType(
            30, "BF16", 1, 2,
            decode=lambda blocks: blocks.view(ml_dtypes.bfloat16).astype(np.float32),
            encode=lambda values: values.astype(ml_dtypes.bfloat16).view(np.uint8),
        ),
        TensorType(36, "i2_s", 128, 32, tail=I2S_TAIL),
        TensorType(
            34, "TQ1_0", TQ_BLOCK, TQ_BYTES["TQ1_0"],
            decode=lambda blocks: _scaled(*gguf_ternary.decode_tq1(blocks)),
            encode=lambda values: gguf_ternary.encode_tq1(*gguf_ternary.ternary_blocks(values)),
        ),
        TensorType(
            35, "TQ2_0", TQ_BLOCK, TQ_BYTES["TQ2_0"],
            decode=lambda blocks: _scaled(*gguf_ternary.decode_tq2(blocks)),
            encode=lambda values: gguf_ternary.encode_tq2(*gguf_ternary.ternary_blocks(values)),
        ),
        TensorType(41, "Q1_0", 128, 18, decode=_decode_q1),
        TensorType(42, "Q2_0", 64, 18, decode=_decode_q2),
        *(
            TensorType(number, name, 32, size)
            for number, name, size in (
                (2, "Q4_0", 18), (3, "Q4_1", 20), (6, "Q5_0", 22), (7, "Q5_1", 24), (8, "Q8_0", 34), (20, "IQ4_NL", 18),
            )
        ),
        *(
            TensorType(number, name, 256, size)
            for number, name, size in (
                (10, "Q2_K", 84), (11, "Q3_K", 110), (12, "Q4_K", 144), (13, "Q5_K", 176), (14, "Q6_K", 210),
                (16, "IQ2_XXS", 66), (17, "IQ2_XS", 74), (18, "IQ3_XXS", 98), (19, "IQ1_S", 50), (21, "IQ3_S", 110),
                (22, "IQ2_S", 82), (23, "IQ4_XS", 136), (29, "IQ1_M", 56),
            )
        ),
    )
}  # fmt: skip
NUMBERS = {record.name: number for number, record in TYPES.items()}

WRITABLE = tuple(name for name in NUMBERS if name not in READ_ONLY)
_CONVERT = "convert the model to one of them with llama-quantize"
_TO_I2S = "convert the model to i2_s with the tools of microsoft/BitNet"
_REFUSED = {
    31: ("Q4_0_4_4, which llama.cpp removed", _CONVERT),
    32: ("Q4_0_4_8, which llama.cpp removed", _CONVERT),
    33: ("Q4_0_8_8, which llama.cpp removed", _CONVERT),
    37: ("i8_s (37), which exists only at run time", _TO_I2S),
    38: ("TL1 (38), tiled for one CPU and its settings", _TO_I2S),
    39: (
        "MXFP4 (39; in files of microsoft/BitNet TL2, tiled for one CPU and its settings)",
        f"{_CONVERT}, or {_TO_I2S}",
    ),
    40: ("NVFP4 (40)", _CONVERT),
    142: (
        "PQ2_0 (142) of the PrismML fork, for inputs rotated as its prism.hadamard keys say",
        "get the unpacked model",
    ),
    143: (
        "PTQ1_0 (143) of the PrismML fork, for inputs rotated as its prism.hadamard keys say",
        "get the unpacked model",
    ),
}
