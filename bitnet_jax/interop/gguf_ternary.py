"""The ternary tensor types of GGUF files: bytes <-> codes and scales.

    i2_s     4 codes per byte, one float32 scale per tensor, at its end      microsoft/BitNet
    TQ1_0    256 codes in 52 bytes in base 3, float16 scale per block        llama.cpp
    TQ2_0    256 codes in 64 bytes, float16 scale per block                  llama.cpp

A tensor [n, k] is stored row by row, TQ rows in whole blocks. A file does not say in which order its i2_s tensors
hold their codes: I2S_LAYOUTS lists the three orders that exist. Nearly every file has the first, as those written here.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

Blocks = np.ndarray  # uint8 [blocks, bytes of a block]

# Layout of i2_s -> distance, in weights, of the four codes of a byte; None: a row, so a byte has four rows.
I2S_LAYOUTS: dict[str, int | None] = {"128x32": 32, "arm-64x16": 16, "rows4": None}
I2S_TAIL = 32  # bytes after the codes; the first four are the scale
FLOAT16_MAX = 65504.0


TQ_BLOCK = 256
TQ_BYTES = {"TQ1_0": 54, "TQ2_0": 66}


class Ternary(NamedTuple):
    """A matrix codes * scale: int8 [n, k], and float32 [1, 1] or, one per block, [n, k / 256]."""

    codes: np.ndarray
    scale: np.ndarray


def decode_ternary(
    name: str, data: np.ndarray, shape: tuple[int, ...], i2s_layout: str = "128x32"
) -> Ternary:
    """The stored codes and scales. Raises ValueError: codes that the type does not define, or an unknown layout."""
    if name != "i2_s":
        codes, scale = (decode_tq1 if name == "TQ1_0" else decode_tq2)(data.reshape(-1, TQ_BYTES[name]))
        return _checked(codes.reshape(shape), scale.reshape(*shape[:-1], -1))
    if i2s_layout not in I2S_LAYOUTS:
        raise ValueError(f"got i2s_layout={i2s_layout!r}, expected one of {', '.join(I2S_LAYOUTS)}")
    width = I2S_LAYOUTS[i2s_layout] or shape[-1]
    if math.prod(shape) % (4 * width):
        raise ValueError(
            f"got shape {list(shape)}, expected a multiple of 4 rows in the i2_s layout {i2s_layout}"
        )
    codes = _pairs(data[:-I2S_TAIL].reshape(-1, 1, width), (6, 4, 2, 0)).reshape(shape)
    scale = data[-I2S_TAIL:][:4].copy().view("<f4").astype(np.float32)
    return _checked(codes, scale.reshape(1, 1))


def _checked(codes: np.ndarray, scale: np.ndarray) -> Ternary:
    if codes.max() > 1:
        raise ValueError("a code is 3, expected 0, 1 or 2; the file is damaged or not ternary")
    return Ternary(codes, scale)


def encode_ternary(name: str, matrix: Ternary) -> np.ndarray:
    """uint8 [nbytes]. i2_s is written in the layout 128x32, and scales of TQ types are rounded to float16.

    Raises:
      ValueError: several scales in i2_s, scales that do not divide blocks of 256, or
        a scale beyond float16.
    """
    (codes, scale), (n, k) = matrix, matrix.codes.shape
    if name == "i2_s":
        if scale.size != 1:
            raise ValueError(f"got {scale.size} scales, expected 1 in the type {name}; choose TQ2_0")
        fields = (codes + np.int8(1)).view(np.uint8).reshape(-1, 4, 32)
        packed = fields[:, 0] << 6 | fields[:, 1] << 4 | fields[:, 2] << 2 | fields[:, 3]
        tail = np.zeros(I2S_TAIL, np.uint8)
        tail[:4] = np.asarray(scale, "<f4").reshape(1).view(np.uint8)
        return np.concatenate([packed.reshape(-1), tail])
    groups = scale.shape[-1]
    if k % groups or k // groups % TQ_BLOCK:
        raise ValueError(
            f"got {groups} scales for {k} inputs, expected groups of a multiple of {TQ_BLOCK} in {name}"
        )
    per_block = np.repeat(np.broadcast_to(scale, (n, groups)), k // groups // TQ_BLOCK, axis=1).reshape(-1)
    blocks = codes.reshape(-1, TQ_BLOCK)
    return (encode_tq1 if name == "TQ1_0" else encode_tq2)(
        blocks, np.where(blocks.any(axis=1), per_block, np.float32(0))
    ).reshape(-1)


def ternary_blocks(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes round(w / max|w|), halves away from zero, and max|w| of each block, as llama.cpp's quantizers."""
    scale = np.abs(values).max(axis=1)
    with np.errstate(over="ignore", invalid="ignore"):  # the reciprocal of a subnormal may be infinite
        inverse = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale > 0)
        ratio = np.nan_to_num(values * inverse[:, None])
    # |ratio| <= 1 up to rounding. Not floor(|ratio| + 0.5): the sum rounds the float32 below 0.5 up.
    return np.sign(ratio).astype(np.int8) * (np.abs(ratio) >= 0.5), scale


def decode_tq2(blocks: Blocks) -> tuple[np.ndarray, np.ndarray]:
    codes = _pairs(blocks[:, :64].reshape(-1, 2, 1, 32), (0, 2, 4, 6))
    return codes.reshape(-1, 256), half(blocks[:, 64:66])


def encode_tq2(codes: np.ndarray, scale: np.ndarray) -> np.ndarray:
    fields = (codes + np.int8(1)).view(np.uint8).reshape(-1, 2, 4, 32)
    packed = fields[:, :, 0] | fields[:, :, 1] << 2 | fields[:, :, 2] << 4 | fields[:, :, 3] << 6
    return _joined(packed.reshape(-1, 64), scale)


# Bytes of a TQ1_0 block: (first, number, digits in each); digit d of byte j is weight d * number + j of its part.
_TQ1_PARTS = ((0, 32, 5), (32, 16, 5), (48, 4, 4))


def decode_tq1(blocks: Blocks) -> tuple[np.ndarray, np.ndarray]:
    parts = []
    for first, count, digits in _TQ1_PARTS:
        powers = np.array([3**d for d in range(digits)], np.uint8)[:, None]
        shifted = (
            blocks[:, None, first : first + count] * powers
        )  # modulo 256: drops the digits before this one
        parts.append((shifted.astype(np.uint16) * np.uint16(3) >> np.uint16(8)).reshape(len(blocks), -1))
    return np.concatenate(parts, axis=1).astype(np.int8) - np.int8(1), half(blocks[:, 52:54])


def encode_tq1(codes: np.ndarray, scale: np.ndarray) -> np.ndarray:
    fields, parts, begin = (codes + np.int8(1)).astype(np.int32), [], 0
    for _, count, digits in _TQ1_PARTS:
        of_part = fields[:, begin : begin + count * digits].reshape(-1, digits, count)
        value = sum(of_part[:, d] * 3 ** (4 - d) for d in range(digits))
        parts.append(-(-value * 256 // 243))  # rounded up, so that multiplying by 3 yields the digits
        begin += count * digits
    return _joined(np.concatenate(parts, axis=1).astype(np.uint8), scale)


def _pairs(packed: np.ndarray, shifts: tuple[int, ...]) -> np.ndarray:
    """uint8 [..., 1, bytes] -> the codes of its bit pairs, int8 [..., 4, bytes]: pair - 1."""
    fields = packed >> np.array(shifts, np.uint8)[:, None] & np.uint8(3)
    return fields.view(np.int8) - np.int8(1)


def _float16(scale: np.ndarray) -> np.ndarray:
    if not np.abs(scale).max(initial=0) <= FLOAT16_MAX:
        raise ValueError(f"got {np.abs(scale).max()}, expected at most {FLOAT16_MAX}, the largest float16")
    return scale.astype("<f2")


def _joined(codes: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return np.concatenate([codes, _float16(scale).reshape(-1, 1).view(np.uint8)], axis=1)


def half(data: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(data).view("<f2").astype(np.float32)
