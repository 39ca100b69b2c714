from .arguments import Arguments
from .precision import Precision
from .recipes import RECIPES, resolve
from .records import ActivationQuantizer, WeightQuantizer
from .registry import ACTIVATION_QUANTIZERS, WEIGHT_QUANTIZERS
from .scales import Quantized
from .ste import STES, straight_through

__all__ = [
    "ACTIVATION_QUANTIZERS",
    "ActivationQuantizer",
    "Arguments",
    "Precision",
    "Quantized",
    "RECIPES",
    "STES",
    "WEIGHT_QUANTIZERS",
    "WeightQuantizer",
    "resolve",
    "straight_through",
]
