"""Latent weights to packed ones, the proof that they agree, and packed models on disk."""
