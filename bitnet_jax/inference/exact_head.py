"""Generation with a bfloat16 head at the cost of an int8 one: the same tokens, half the bytes read.

    variables = with_exact_head(config, variables)
    generate(config, variables, ...)             # output is bit-identical

An int8 copy of the head selects the few rows that can hold the k largest logits, with a proof that no other row can
(bitnet_kernels/head_exact.py); only those are multiplied in bfloat16. This works where only the k largest logits
matter: greedy decoding (k = 1), and sampling with top_k followed by any temperature, top_p and min_p. Sampling
without top_k needs every logit, and a repetition penalty changes their order: both are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
from jaxtyping import Array, Float

from bitnet_jax.inference.sampling import SamplingConfig
from bitnet_jax.models import ModelConfig
from bitnet_jax.quantization.precision import Precision
from bitnet_jax.quantization.recipes import RECIPES
from bitnet_kernels import PackedArray, TopLogits, exact_top_logits, head_bounds, pack

COLLECTION = "exact_head"  # the key of an ExactHead in the variables, next to "params"


@flax.struct.dataclass
class ExactHead:
    table: Float[Array, "V D"]  # bfloat16: the head itself, the same array as in the parameters
    weight: PackedArray  # its int8 copy
    bounds: Float[Array, "2 V"]

    def top_logits(self, hidden: Float[Array, "B D"], k: int) -> TopLogits:
        """The k largest logits, exactly; -inf for the others."""
        return exact_top_logits(hidden, self.table, self.weight, self.bounds, k)


def with_exact_head(config: ModelConfig, variables: Mapping[str, Any]) -> dict[str, Any]:
    """The variables plus an int8 copy of the head, one byte per weight.

    Raises:
      ValueError: the model has no head stored in bfloat16.
    """
    if config.head != "float":
        raise ValueError(
            f"got a model with head={config.head!r}, expected 'float': an exact head computes bfloat16 logits"
        )
    name, leaf = ("embed", "embedding") if config.tie_embeddings else ("lm_head", "weight")
    table = variables["params"].get(name, {}).get(leaf)
    if table is None or str(table.dtype) != "bfloat16":
        stored = "none" if table is None else str(table.dtype)
        raise ValueError(
            f"got {name}/{leaf}: {stored}, expected a head stored in bfloat16; "
            "pack a model with embedding_dtype='bfloat16'"
        )
    weight = quantized_copy(table)
    return {**variables, COLLECTION: ExactHead(table, weight, head_bounds(table, weight))}


@jax.jit
def quantized_copy(table: Float[Array, "V D"]) -> PackedArray:
    """The table in int8 with one scale per row, absmax / 127."""
    precision = RECIPES["int8"]
    assert isinstance(precision, Precision)
    quantized = precision.quantize_weight(table)
    return pack(quantized.codes.astype("int8"), quantized.scale, "int8")


def logits_needed(sampling: SamplingConfig) -> int:
    """k: the number of largest logits that determine the next token.

    Raises:
      ValueError: sampling needs all logits.
    """
    if sampling.repetition_penalty != 1:
        raise ValueError(
            f"got repetition_penalty={sampling.repetition_penalty}, expected 1: an exact head computes only the "
            "largest logits, and the penalty needs all of them"
        )
    if sampling.temperature == 0:
        return 1
    if sampling.top_k is None:
        raise ValueError(
            f"got temperature={sampling.temperature} without top_k, expected top_k: an exact head computes only the "
            "largest logits"
        )
    return sampling.top_k
