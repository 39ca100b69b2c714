"""Generation with the bfloat16 head at the price of an int8 one: the same tokens, half the bytes read.

    variables = with_exact_head(config, variables)
    generate(config, variables, ...)             # as before, bit for bit

An int8 copy of the head finds the few rows that may hold the k largest logits, with a proof that no other does
(bitnet_kernels/head_exact.py); only those are multiplied in bfloat16. It serves what looks at the k largest
logits alone: greedy (k = 1) and sampling with top_k, with any temperature, top_p and min_p behind it. Sampling
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

COLLECTION = "exact_head"  # the key of variables under which an ExactHead stands beside "params"


@flax.struct.dataclass
class ExactHead:
    table: Float[Array, "V D"]  # bfloat16: the head itself, the same array as in the parameters
    weight: PackedArray  # its int8 copy
    bounds: Float[Array, "2 V"]

    def top_logits(self, hidden: Float[Array, "B D"], k: int) -> TopLogits:
        """The k largest logits, exactly; -inf for the others."""
        return exact_top_logits(hidden, self.table, self.weight, self.bounds, k)


def with_exact_head(config: ModelConfig, variables: Mapping[str, Any]) -> dict[str, Any]:
    """The same variables with an int8 copy of the head beside them, a byte for each of its weights.

    Raises:
      ValueError: the model has no head that is stored in bfloat16.
    """
    if config.head != "float":
        raise ValueError(
            f"the model has head={config.head!r}, whose logits no bfloat16 head gives; expected 'float'"
        )
    name, leaf = ("embed", "embedding") if config.tie_embeddings else ("lm_head", "weight")
    table = variables["params"].get(name, {}).get(leaf)
    if table is None or str(table.dtype) != "bfloat16":
        stored = "none" if table is None else str(table.dtype)
        raise ValueError(
            f"an exact head needs one that is stored in bfloat16, got {name}/{leaf}: {stored}; "
            "pack a model with embedding_dtype='bfloat16'"
        )
    weight = quantized_copy(table)
    return {**variables, COLLECTION: ExactHead(table, weight, head_bounds(table, weight))}


@jax.jit
def quantized_copy(table: Float[Array, "V D"]) -> PackedArray:
    """The table in int8 with a scale for every row, |largest| / 127."""
    precision = RECIPES["int8"]
    assert isinstance(precision, Precision)
    quantized = precision.quantize_weight(table)
    return pack(quantized.codes.astype("int8"), quantized.scale, "int8")


def looked_at(sampling: SamplingConfig) -> int:
    """k: how many of the largest logits decide the next token.

    Raises:
      ValueError: all of them do.
    """
    if sampling.repetition_penalty != 1:
        raise ValueError(
            f"an exact head knows the largest logits only, and repetition_penalty={sampling.repetition_penalty} "
            "needs all; expected 1"
        )
    if sampling.temperature == 0:
        return 1
    if sampling.top_k is None:
        raise ValueError(
            f"an exact head knows the largest logits only; with temperature={sampling.temperature} expected "
            "top_k, how many to choose from"
        )
    return sampling.top_k
