from .inference.generation import generate
from .inference.sampling import SamplingConfig
from .model_folders import load_model
from .models import PRESETS, ModelConfig, Transformer
from .nn.linear import BitLinear
from .packed.packing import pack
from .packed.proof import prove
from .packed.storage import save_packed
from .quantization.precision import Precision
from .quantization.recipes import RECIPES, resolve
from .training.config import RunConfig
from .training.loop import fit

__version__: str

__all__ = [
    "BitLinear",
    "ModelConfig",
    "PRESETS",
    "Precision",
    "RECIPES",
    "RunConfig",
    "SamplingConfig",
    "Transformer",
    "fit",
    "generate",
    "load_model",
    "pack",
    "prove",
    "resolve",
    "save_packed",
]
