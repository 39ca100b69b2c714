"""Analytic counts of a Transformer's matrix product operations, their energy in joules, and the bits of its weights.

The energy model is that of BitNet (2310.11453): every addition and multiplication of a matrix product has a price.
A float product multiplies and adds for every weight. One with binary or ternary weights only adds, and multiplies
to quantize each input and to rescale each output; attention stays in floats. Every token of a text of s tokens attends
to s keys, so 1/s of the cost of the text is also the cost of one more token after s others.

Not counted, as in the papers: norms, softmax, activation functions, rotary embeddings, embeddings, data movement. The
output head, which the papers omit, is a separate part.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import NamedTuple

from bitnet_jax.models import ModelConfig
from bitnet_jax.names import check_name
from bitnet_jax.nn.tables import table_precision
from bitnet_jax.quantization.precision import Precision

HEADS = ("lm_head", "classifier")


class Price(NamedTuple):
    """Picojoules of one operation."""

    add: float
    multiply: float


# process -> number -> Price; 2310.11453, table of energy per operation. The paper prices the accumulation of int8
# products as int8 additions; so are sums of fewer bits here, for which it has no price.
PICOJOULES: dict[str, dict[str, Price]] = {
    "45nm": {"float32": Price(0.9, 3.7), "float16": Price(0.4, 1.1), "int8": Price(0.03, 0.2)},
    "7nm": {"float32": Price(0.38, 1.31), "float16": Price(0.16, 0.34), "int8": Price(0.007, 0.07)},
}
FLOATS = ("float16", "float32")

# Storage bits per weight. First the formats of bitnet.cpp (2410.16144, 2502.11880) and llama.cpp, whose TQ1_0 and
# TQ2_0 hold 256 weights and a scale in 54 and 66 bytes; then those of bitnet_kernels.
BITS_PER_WEIGHT: dict[str, float] = {
    "I2_S": 2,  # two bits
    "TL1": 2,  # two weights in four bits
    "TL2": 5 / 3,  # three weights in a sign and a four-bit index
    "TQ1_0": 8 * 54 / 256,
    "TQ2_0": 8 * 66 / 256,
    "Sherry": 5 / 4,  # 2601.07892: one weight in four is zero, 4 * 2^3 patterns
    "binary": 1,
    "ternary2": 2,
    "ternary5": 8 / 5,  # five base-3 digits in a byte
    "int4": 4,
    "int8": 8,
    "uint4": 4,
}

# attention kind -> operands of q.k and of P.v. Floats multiply and add; signs and 0/1-selected values only add.
_ATTENTION_PRODUCTS: dict[str, tuple[str, str]] = {
    "softmax": ("floats", "floats"),
    "relu": ("floats", "floats"),
    "linear": ("floats", "floats"),
    "binary_qk": ("signs", "floats"),
    "binary": ("signs", "picked"),
}


@dataclasses.dataclass(frozen=True)
class Operations:
    """Operations of one part of the model in one number format."""

    part: str  # linear, rescale, attention, head
    number: str  # int8, float16 or float32
    adds: float
    multiplies: float


@dataclasses.dataclass(frozen=True)
class Joules:
    add: float
    multiply: float

    @property
    def total(self) -> float:
        return self.add + self.multiply


# Pattern of linear paths -> share of zeros among their inputs; zeros cost nothing.
Zeros = Mapping[str, float]


def operations(
    config: ModelConfig, length: int, *, floats: str = "float16", zeros: Zeros | None = None
) -> tuple[Operations, ...]:
    """Operations of one text of `length` tokens, by part and number.

    Args:
      floats: format of all floats, float16 (the papers' baseline) or float32.
      zeros: the first pattern that matches a path (fnmatch) applies; default: the share zeroed by top-k sparsity.

    Raises:
      ValueError: an unknown float format, a length below 1, a share outside [0, 1], or a pattern without a match.
    """
    check_name("floats", floats, FLOATS)
    if length < 1:
        raise ValueError(f"length: got {length}, expected at least 1 token")
    precisions, zero_shares = config.precisions(), _zero_shares(config, zeros or {})
    rows: list[Operations] = []
    for path, (n, k) in config.linear_shapes().items():
        count = 1 if path == "classifier" else length
        part = "head" if path in HEADS else "linear"
        rows += _product(part, count, n, k, precisions.get(path, Precision()), zero_shares[path], floats)
    if config.head_is_table:
        table = table_precision(config.embedding_dtype, config.hidden_size) or Precision()
        rows += _product("head", length, config.vocab_size, config.hidden_size, table, 0.0, floats)
    # Linear attention multiplies with a state of head_size rows instead of the keys.
    keys = config.head_size if config.attention == "linear" else length
    macs = length * keys * config.num_layers * config.num_heads * config.head_size
    for operands in _ATTENTION_PRODUCTS[config.attention]:
        number = "int8" if operands == "signs" else floats
        rows.append(Operations("attention", number, macs, macs if operands == "floats" else 0))
    return _summed(rows)


def _product(
    part: str, count: int, n: int, k: int, precision: Precision, zeros: float, floats: str
) -> list[Operations]:
    """`count` vectors of k inputs times a matrix [n, k]."""
    macs = count * n * k * (1 - zeros)
    quantizer = precision.weight_quantizer
    if quantizer is None:
        return [Operations(part, floats, macs, macs)]
    integers = precision.activation != "none"
    adds_only = precision.packed_format in ("binary", "ternary2")
    macs *= precision.input_digits  # each digit is multiplied
    product = Operations(part, "int8" if integers else floats, macs, 0 if adds_only else macs)
    inputs = count * k if precision.activation_bits > 1 and integers else 0  # a sign needs no product
    unit = precision.scale == "none" or (precision.scale == "analytic" and quantizer.unit_scale)
    rescaled = inputs or not unit
    groups = k // precision.granularity if isinstance(precision.granularity, int) else 1
    outputs = count * n * groups if rescaled else 0
    added = count * n * (groups - 1) if rescaled else 0
    return [product, Operations("rescale" if part == "linear" else part, floats, added, inputs + outputs)]


def _summed(rows: Iterable[Operations]) -> tuple[Operations, ...]:
    sums: dict[tuple[str, str], Operations] = {}
    for row in rows:
        before = sums.get((row.part, row.number), Operations(row.part, row.number, 0, 0))
        sums[row.part, row.number] = dataclasses.replace(
            before, adds=before.adds + row.adds, multiplies=before.multiplies + row.multiplies
        )
    return tuple(sums.values())


def joules(rows: Iterable[Operations], process: str = "7nm", *, head: bool = False) -> Joules:
    """Energy of operations in a process technology, "45nm" or "7nm"; head: include the output head."""
    check_name("process", process, PICOJOULES)
    counted = [row for row in rows if head or row.part != "head"]
    prices = PICOJOULES[process]
    return Joules(
        1e-12 * sum(row.adds * prices[row.number].add for row in counted),
        1e-12 * sum(row.multiplies * prices[row.number].multiply for row in counted),
    )


class Activated(NamedTuple):
    parameters: int  # of the linear layers, without the head
    activated: float  # parameters multiplied by non-zero inputs
    sparsity: float  # 1 - activated / parameters


def activated_parameters(config: ModelConfig, zeros: Zeros) -> Activated:
    """Activated parameters of BitNet a4.8 (2411.04965): weights times the share of non-zero inputs.

    zeros as in `operations`.
    """
    shares = _zero_shares(config, zeros)
    weights = {path: n * k for path, (n, k) in config.linear_shapes().items() if path not in HEADS}
    total = sum(weights.values())
    activated = sum(count * (1 - shares[path]) for path, count in weights.items())
    return Activated(total, activated, 1 - activated / total)


def _zero_shares(config: ModelConfig, zeros: Zeros) -> dict[str, float]:
    paths, precisions = list(config.linear_shapes()), config.precisions()
    for pattern, share in zeros.items():
        if not 0 <= share <= 1:
            raise ValueError(f"zeros: got {share} for {pattern!r}, expected a share in [0, 1]")
        if not any(fnmatchcase(path, pattern) for path in paths):
            raise ValueError(
                f"zeros: got the pattern {pattern!r}, expected one that matches a path such as {paths[0]}"
            )
    return {
        path: next(
            (share for pattern, share in zeros.items() if fnmatchcase(path, pattern)),
            1 - precisions.get(path, Precision()).top_k,
        )
        for path in paths
    }


def ideal_bits(config: ModelConfig, linear_bits: float | None = None, other_bits: float = 16) -> float:
    """Bits of the weights without scales, padding and norms: the size formula of Spectra (2407.12327).

    Args:
      linear_bits: bits per weight of a linear layer; None: those of its recipe, log2(3) if ternary.
      other_bits: bits per weight of embeddings and output head.
    """
    precisions = config.precisions()
    linear = sum(
        n * k * (precisions[path].weight_bits if linear_bits is None else linear_bits)
        for path, (n, k) in config.linear_shapes().items()
        if path not in HEADS
    )
    tables = 1 if config.tie_embeddings or config.num_classes else 2
    others = (tables * config.vocab_size + config.num_classes) * config.hidden_size
    return linear + others * other_bits


def without_quantization(config: ModelConfig) -> ModelConfig:
    """The same architecture without quantization: the papers' baseline."""
    attention = "softmax" if config.attention.startswith("binary") else config.attention
    return dataclasses.replace(config, precision="float32", head="float", attention=attention)
