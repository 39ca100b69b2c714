"""Quantizers by name: pure functions from real arrays to `Quantized(codes, scale)`.

Weights:      f(w [n, k], *, granularity, ste, scale, progress, key, ...) -> codes [n, k], scale [#n, G]
Activations:  f(x [..., k], *, ste, scale, shift, progress, key, ...)     -> codes [..., k], scale [..., 1]

`scale=None` measures the scale and passes it no gradient; an array is a learned scale with the gradient of
LSQ and its 1/sqrt(N Qp) factor. Further keyword arguments are the details on which papers and codes disagree;
the defaults follow the released 2B-4T checkpoint for ternary and int8, the paper for BitNet's binary.

Everything is computed in float32 whatever the input dtype; codes and scale are float32. Gradients come from
autodiff through codes * scale, and STEs (ste.py) say what a step's derivative is.

Non-finite input is never hidden. A NaN makes its own code NaN and, where the scale is measured, the scale of
everything it shares one with. An infinity takes the outermost code where the scale does not depend on it, and
otherwise makes the scale infinite and its neighbours 0 * inf = NaN once dequantized.

Subnormal numbers are zeros wherever the backend flushes them, as XLA's CPU does: sign(-1e-40) is sign(-0).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from bitnet_jax.quantization import activations, weights
from bitnet_jax.quantization.activations import hadamard, top_k
from bitnet_jax.quantization.scales import Quantized

__all__ = ["ACTIVATION_QUANTIZERS", "WEIGHT_QUANTIZERS", "Quantized", "hadamard", "top_k"]

WEIGHT_QUANTIZERS: dict[str, Callable[..., Quantized]] = {
    "binary": weights.binary,
    "binary_centred": weights.binary_centred,
    "binary_raw": weights.binary_raw,
    "binary_stochastic": weights.binary_stochastic,
    "bwn": weights.bwn,
    "zero_one": weights.zero_one,
    "ternary_absmean": weights.ternary_absmean,
    "ternary_absmedian": weights.ternary_absmedian,
    "ternary_twn": weights.ternary_twn,
    "seq_ternary": partial(weights.stretched_elastic, levels=3),
    "seq_int2": partial(weights.stretched_elastic, levels=4),
    "int2": partial(weights.integer, bits=2, levels="midrise", statistic="absmean"),
    "int3": partial(weights.integer, bits=3),
    "int4": partial(weights.integer, bits=4),
    "int8": partial(weights.integer, bits=8),
}

ACTIVATION_QUANTIZERS: dict[str, Callable[..., Quantized]] = {
    "none": activations.unquantized,
    "int8": activations.int8,
    "int4": activations.int4,
    "int2": activations.int2,
    "sign": activations.sign,
    "sign_absmean": activations.sign_absmean,
    "boolean": activations.boolean,
    "elastic_signed": activations.elastic_signed,
    "elastic_unsigned": activations.elastic_unsigned,
}
