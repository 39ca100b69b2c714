"""The training state: everything an update reads and writes."""

from __future__ import annotations

from collections.abc import Mapping

import flax.struct
import jax.numpy as jnp
from jaxtyping import PyTree

from bitnet_jax.training.optimizers import Optimizer


@flax.struct.dataclass
class TrainState:
    """Latent float32 parameters, optimizer state and other model state after `step` updates.

    It holds no random key and no data position: both follow from `step` and the run's seed.
    """

    step: PyTree  # int32 []; like the others, its ShapeDtypeStruct or sharding in a tree of those
    params: PyTree
    opt_state: PyTree
    model_state: dict[str, PyTree] = flax.struct.field(default_factory=dict)  # batch statistics, or empty

    @classmethod
    def create(cls, variables: Mapping[str, PyTree], optimizer: Optimizer) -> TrainState:
        """From model variables: "params", which is optimized, and collections that are only carried along."""
        model_state = {name: part for name, part in variables.items() if name != "params"}
        params = variables["params"]
        return cls(jnp.zeros((), jnp.int32), params, optimizer.init(params), model_state)

    @property
    def variables(self) -> dict[str, PyTree]:
        return {"params": self.params, **self.model_state}
