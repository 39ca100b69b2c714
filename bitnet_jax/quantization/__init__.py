"""Real numbers to few bits: straight-through estimators, scales, quantizers, precisions and recipes."""
