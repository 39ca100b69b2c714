"""Precisions of embedding tables and of output heads that are not float."""

from __future__ import annotations

from bitnet_jax.quantization.precision import Precision
from bitnet_jax.quantization.recipes import RECIPES

HEADS = ("float", "int8", "int4")
INTEGER_TABLES = {name: f"{name}_a16" for name in ("int8", "int4", "uint4")}  # embedding_dtype -> recipe


def head_precision(head: str, inputs: int) -> Precision:
    """int8: one scale per row. int4: one per 128 inputs, or per 64 or 32 if 128 does not divide them."""
    if head == "int8":
        return Precision(weight="int8", activation="int8", granularity="channel")
    group = next((size for size in (128, 64, 32) if inputs % size == 0), None)
    if group is None:
        raise ValueError(f"model.head={head!r}: got hidden_size={inputs}, expected a multiple of 32")
    return Precision(weight=head, activation="int8", granularity=group)


def table_precision(embedding_dtype: str, inputs: int) -> Precision | None:
    """Of an integer embedding table, as rows are looked up and as a head is multiplied; None for a float one.

    Blocks and scales are those of the types Q8_0, Q4_0 and Q4_1 of GGUF files; the input of a head has 16 bits.
    """
    if embedding_dtype not in INTEGER_TABLES:
        return None
    precision = RECIPES[INTEGER_TABLES[embedding_dtype]]
    assert isinstance(precision, Precision)
    assert isinstance(precision.granularity, int)
    if inputs % precision.granularity:
        raise ValueError(
            f"model.embedding_dtype={embedding_dtype!r}: got hidden_size={inputs}, expected a multiple of "
            f"{precision.granularity}"
        )
    return precision
