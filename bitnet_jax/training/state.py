"""Everything that one update reads and writes."""

from __future__ import annotations

import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Int, PyTree

from bitnet_jax.training.optimizers import Optimizer


@flax.struct.dataclass
class TrainState:
    """Latent float32 parameters with their optimizer state after `step` updates.

    There is no random key and no data position in it: both follow from `step` and the run's seed.
    """

    step: Int[Array, ""]
    params: PyTree
    opt_state: PyTree

    @classmethod
    def create(cls, params: PyTree, optimizer: Optimizer) -> TrainState:
        return cls(jnp.zeros((), jnp.int32), params, optimizer.init(params))
