from .checkpoints import CheckpointError
from .config import RunConfig
from .interrupt import Interrupted
from .load import load_image_run, load_run, read_run
from .loop import fit
from .run_folder import RunError
from .task import Task

__all__ = [
    "CheckpointError",
    "Interrupted",
    "RunConfig",
    "RunError",
    "Task",
    "fit",
    "load_image_run",
    "load_run",
    "read_run",
]
