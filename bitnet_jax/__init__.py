"""Transformers with one-bit and few-bit weights in JAX: train, pack to bits, prove equal, generate.

Import what you need from the modules themselves (`from bitnet_jax.quantization.precision import Precision`): importing
this package does no work and touches no device.
"""

__version__ = "0.1.0"
