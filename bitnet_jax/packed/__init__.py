"""Latent weights to packed ones, the proof that they agree, and packed models on disk."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
