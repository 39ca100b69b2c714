from .cache import init_cache
from .generation import Generation, generate, greedy, left_pad, stream_tokens
from .sampling import SamplingConfig
from .streaming import stream

__all__ = [
    "Generation",
    "SamplingConfig",
    "generate",
    "greedy",
    "init_cache",
    "left_pad",
    "stream",
    "stream_tokens",
]
