"""Transformers with binary, ternary and few-bit weights in JAX: train, pack to bits, prove equal, generate.

The names below are imported when they are first used: importing this package does no work and touches no device.
"""

import lazy_loader

__version__ = "0.1.0"
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
