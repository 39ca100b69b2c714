"""Using a model, latent or packed: the cache, the choice of the next token, generation, and streamed text."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
