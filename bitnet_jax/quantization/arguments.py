"""What a layer tells any quantizer beside the array to quantize."""

from __future__ import annotations

import dataclasses
import functools

import jax
from jaxtyping import Array, Float, PRNGKeyArray

from bitnet_jax.quantization.scales import Granularity
from bitnet_jax.quantization.ste import Progress


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["scale", "shift", "progress", "key"],
    meta_fields=["granularity", "ste"],
)
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Arguments:
    """The arguments that all quantizers share. A pytree: the arrays are its leaves, the names are static.

    A quantizer's record (registry.py) says which of them it uses; to set another one is an error there.
    """

    granularity: Granularity = "tensor"  # of a measured weight scale
    ste: str = "identity"  # a name in ste.STES
    scale: Float[Array, "..."] | None = (
        None  # a learned one: [#n, G] of weights, [] of an input; None: measure it
    )
    shift: Float[Array, "k"] | None = None  # a learned threshold per input feature
    progress: Progress = 1.0  # fraction of training done, for the STEs that follow it
    key: PRNGKeyArray | None = None  # to draw random codes; None: the deterministic ones


DEFAULT = Arguments()
