"""Inference with latent or packed models: KV cache, sampling, generation and streamed text."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
