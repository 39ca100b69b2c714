"""Packing latent weights, proving that the packed model is equal, and storing packed models."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
