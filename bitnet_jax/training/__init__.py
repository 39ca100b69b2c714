"""Training: from a run config to checkpoints, metrics and a result, in bits that repeat."""

from bitnet_jax.training.checkpoints import CheckpointError
from bitnet_jax.training.config import RunConfig
from bitnet_jax.training.interrupt import Interrupted
from bitnet_jax.training.load import load_image_run, load_run
from bitnet_jax.training.loop import fit
from bitnet_jax.training.run_folder import RunError

__all__ = [
    "CheckpointError",
    "Interrupted",
    "RunConfig",
    "RunError",
    "fit",
    "load_image_run",
    "load_run",
]
