"""Arguments of a quantizer other than the array to quantize."""

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
    """Arguments shared by all quantizers. A pytree: arrays are leaves, `granularity` and `ste` are static.

    A quantizer's record (registry.py) lists those it uses and raises ValueError if another one is set.
    """

    granularity: Granularity = "tensor"  # of a measured weight scale
    ste: str = "identity"  # a name in ste.STES
    scale: Float[Array, "..."] | None = (
        None  # learned scale: [#n, G] for weights, [] for activations; None: measure it
    )
    shift: Float[Array, "k"] | None = None  # learned threshold per input feature
    progress: Progress = 1.0  # fraction of training done, for annealed STEs
    key: PRNGKeyArray | None = None  # for stochastic codes; None: deterministic codes


DEFAULT = Arguments()
