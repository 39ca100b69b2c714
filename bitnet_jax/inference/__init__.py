"""Using a model, latent or packed: the cache, the choice of the next token, generation, and streamed text."""
