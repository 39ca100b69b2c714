"""Low-rank adapters of linear layers (LoRA, 2106.09685) beside weights of any kind:

    y = layer(x) + b (scale * (a x))

The collection `adapter` of a model's variables holds at the path of a linear layer

    a      [r, k]  float32
    b      [n, r]  float32
    scale  [r]     float32: alpha / r, for each of the r ranks

x is the input of the layer after its norm and before it is quantized: with the input before the norm the adapter helps
at first and hurts when it is trained long. Several adapters are one, their ranks one after the other.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
from jaxtyping import Array, Float

from bitnet_jax.nn.context import from_rows, to_rows
from bitnet_jax.nn.products import ordered_product
from bitnet_jax.quantization.scales import floats

COLLECTION = "adapter"
PARTS = ("a", "b", "scale")


def adapter_output(x: Float[Array, "*rows k"], adapter: Mapping[str, jax.Array]) -> Float[Array, "*rows n"]:
    """b (scale * (a x)) in float32. On a CPU a row has the same bits whatever the other rows are."""
    rows = to_rows(floats("x", x).astype("float32"))
    inner = ordered_product(rows, adapter["a"]) * adapter["scale"][None]
    return from_rows(ordered_product(inner, adapter["b"]), x.shape[:-1])
