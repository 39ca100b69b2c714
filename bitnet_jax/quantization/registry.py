"""All quantizers by name: records of pure functions from a real array to `Quantized(codes, scale)`.

Weights:      f(w [n, k],   args, *, options) -> codes [n, k],   scale [#n, G], minimum like scale or None
Activations:  f(x [..., k], args, *, options) -> codes [..., k], scale [..., 1]

`args` (arguments.py) is common to all. With `args.scale=None` the scale is measured and gets no gradient; an array is
a learned scale with LSQ's gradient and its 1/sqrt(N Qp) factor. Options are details on which papers and released code
disagree; defaults follow the released 2B-4T checkpoint for ternary and int8, and the paper for BitNet's binary.

All arithmetic is float32 regardless of the input dtype; codes and scale are float32. Gradients are autodiff through
codes * scale (+ minimum), with the derivative of a step given by its STE (ste.py).

Non-finite input is never hidden. A NaN makes its own code NaN and, if the scale is measured, the scale that it
contributes to. An infinity gets the outermost code if the scale does not depend on it; otherwise the scale is
infinite, and values that share it dequantize to 0 * inf = NaN.

Subnormal numbers are zero if the backend flushes them, as XLA's CPU backend does: sign(-1e-40) is sign(-0).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

from bitnet_jax.quantization import activations, binary_weights, block_weights, multilevel_weights
from bitnet_jax.quantization.records import (
    ROUNDING_STES,
    SIGN_STES,
    ActivationQuantizer,
    Options,
    PackedFormat,
    WeightQuantizer,
)
from bitnet_jax.quantization.scales import absmax, measure

_binary = partial(WeightQuantizer, bits=1, packed_format="binary", stes=SIGN_STES)
_ternary = partial(WeightQuantizer, bits=math.log2(3), packed_format="ternary2", stes=ROUNDING_STES)
_stretched = partial(
    WeightQuantizer,
    function=multilevel_weights.stretched_elastic,
    stes=ROUNDING_STES,
    first_scale=lambda w, granularity: measure(absmax, w, granularity),  # alpha, not the step
)


def _integer_format(bits: int) -> Callable[[Options], PackedFormat | None]:
    """The smallest integer format that holds the b-bit grid; the mid-rise grid extends to 2^b - 1."""

    def packed_format(options: Options) -> PackedFormat | None:
        size = 2 ** (bits if options.get("levels") == "midrise" else bits - 1)
        return "int4" if size <= 8 else "int8" if size <= 128 else None

    return packed_format


def _integer(bits: int) -> WeightQuantizer:
    return WeightQuantizer(
        function=multilevel_weights.integer,
        fixed={"bits": bits},
        bits=bits,
        packed_format=_integer_format(bits),
        stes=ROUNDING_STES,
        lsq_code=2 ** (bits - 1) - 1,
    )


WEIGHT_QUANTIZERS: dict[str, WeightQuantizer] = {
    "binary": _binary(function=binary_weights.binary),
    "binary_centred": _binary(function=binary_weights.binary_centred),
    "binary_raw": _binary(function=binary_weights.binary_raw, unit_scale=True),
    "binary_stochastic": _binary(function=binary_weights.binary_stochastic, unit_scale=True, random=True),
    "bwn": _binary(function=binary_weights.bwn),
    "zero_one": WeightQuantizer(
        function=binary_weights.zero_one, bits=1, packed_format="ternary2", stes=ROUNDING_STES
    ),
    "ternary_absmean": _ternary(function=multilevel_weights.ternary_absmean),
    "ternary_absmedian": _ternary(function=multilevel_weights.ternary_absmedian),
    "ternary_twn": _ternary(function=multilevel_weights.ternary_twn),
    "seq_ternary": _stretched(fixed={"levels": 3}, bits=math.log2(3), packed_format="ternary2"),
    "seq_int2": _stretched(fixed={"levels": 4}, bits=2, packed_format="int4"),
    "int2": WeightQuantizer(
        function=multilevel_weights.int2, bits=2, packed_format="int4", stes=ROUNDING_STES
    ),
    "int3": _integer(3),
    "int4": _integer(4),
    "int6": _integer(6),
    "int8": _integer(8),
    "uint4": WeightQuantizer(
        function=block_weights.uint4, bits=4, packed_format="uint4", stes=ROUNDING_STES, first_scale=None
    ),
}

_sign = partial(ActivationQuantizer, bits=1, stes=SIGN_STES, has_threshold=True)

# Initial scales: LSQ's 2 / sqrt(Qp), BiT's 2 and 4.
ACTIVATION_QUANTIZERS: dict[str, ActivationQuantizer] = {
    "none": ActivationQuantizer(function=activations.unquantized, bits=None, stes=ROUNDING_STES),
    "int8": ActivationQuantizer(
        function=activations.int8, bits=8, stes=ROUNDING_STES, first_scale=2 / math.sqrt(127)
    ),
    "int16": ActivationQuantizer(function=activations.int16, bits=16, stes=ROUNDING_STES),
    "int4": ActivationQuantizer(
        function=activations.int4, bits=4, stes=ROUNDING_STES, first_scale=2 / math.sqrt(7)
    ),
    "int2": ActivationQuantizer(function=activations.int2, bits=2, stes=ROUNDING_STES, first_scale=1.0),
    "sign": _sign(function=activations.sign, signs=True),
    "sign_absmean": _sign(function=activations.sign_absmean, signs=True),
    "boolean": _sign(function=activations.boolean),
    "elastic_signed": _sign(
        function=activations.elastic_signed, signs=True, first_scale=2.0, measures_scale=False
    ),
    "elastic_unsigned": ActivationQuantizer(
        function=activations.elastic_unsigned,
        bits=1,
        stes=ROUNDING_STES,
        has_threshold=True,
        first_scale=4.0,
        measures_scale=False,
    ),
}
