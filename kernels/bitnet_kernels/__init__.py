"""Kernels for matrices with 1 to 8 bits per element; depends on jax, not on bitnet_jax."""

from bitnet_kernels.attention import cached_attention, reference_attention
from bitnet_kernels.extend_attention import extend_and_attend
from bitnet_kernels.formats import dequantize, pack, packed_rows, relayout, unpack
from bitnet_kernels.head import bfloat16_logits
from bitnet_kernels.head_exact import TopLogits, exact_top_logits, head_bounds
from bitnet_kernels.lookup import bfloat16_rows
from bitnet_kernels.matmul import (
    IMPLEMENTATIONS,
    Choice,
    choose_implementation,
    for_platform,
    packed_matmul,
    packed_matmuls,
)
from bitnet_kernels.norms import reference_rms_norm, rms_norm
from bitnet_kernels.packed import FORMATS, LAYOUTS, PackedArray, validate
from bitnet_kernels.products import code_matmul, float_matmul
from bitnet_kernels.sharded import sharded_matmul
from bitnet_kernels.training_attention import softmax_attention

__all__ = [
    "FORMATS",
    "IMPLEMENTATIONS",
    "LAYOUTS",
    "Choice",
    "PackedArray",
    "TopLogits",
    "bfloat16_logits",
    "bfloat16_rows",
    "cached_attention",
    "choose_implementation",
    "code_matmul",
    "dequantize",
    "exact_top_logits",
    "extend_and_attend",
    "float_matmul",
    "for_platform",
    "head_bounds",
    "pack",
    "packed_matmul",
    "packed_matmuls",
    "packed_rows",
    "reference_attention",
    "reference_rms_norm",
    "relayout",
    "rms_norm",
    "sharded_matmul",
    "softmax_attention",
    "unpack",
    "validate",
]
