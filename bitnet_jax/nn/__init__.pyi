from .attention import Attention
from .batch_norm import BatchNorm
from .config import Architecture
from .conv import BitConv
from .embedding import Embedding
from .linear import BitLinear, precisions_of
from .mlp import MLP
from .norms import Norm

__all__ = [
    "Architecture",
    "Attention",
    "BatchNorm",
    "BitConv",
    "BitLinear",
    "Embedding",
    "MLP",
    "Norm",
    "precisions_of",
]
