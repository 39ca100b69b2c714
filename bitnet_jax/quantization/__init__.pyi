from .precision import Precision
from .recipes import RECIPES, resolve
from .registry import ACTIVATION_QUANTIZERS, WEIGHT_QUANTIZERS
from .scales import Quantized
from .ste import STES, straight_through

__all__ = [
    "ACTIVATION_QUANTIZERS",
    "Precision",
    "Quantized",
    "RECIPES",
    "STES",
    "WEIGHT_QUANTIZERS",
    "resolve",
    "straight_through",
]
