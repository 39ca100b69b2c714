"""Everything that one update reads and writes."""

from __future__ import annotations

from collections.abc import Mapping

import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Int, PyTree

from bitnet_jax.training.optimizers import Optimizer


@flax.struct.dataclass
class TrainState:
    """Latent float32 parameters with their optimizer state after `step` updates, and what else the model keeps.

    There is no random key and no data position in it: both follow from `step` and the run's seed.
    """

    step: Int[Array, ""]
    params: PyTree
    opt_state: PyTree
    model_state: dict[str, PyTree] = flax.struct.field(default_factory=dict)  # batch statistics, or nothing

    @classmethod
    def create(cls, variables: Mapping[str, PyTree], optimizer: Optimizer) -> TrainState:
        """From the variables of a model: "params", which are optimized, and collections that are only replaced."""
        model_state = {name: part for name, part in variables.items() if name != "params"}
        params = variables["params"]
        return cls(jnp.zeros((), jnp.int32), params, optimizer.init(params), model_state)

    @property
    def variables(self) -> dict[str, PyTree]:
        return {"params": self.params, **self.model_state}
