"""Serving: an engine that answers many requests at once, with the bytes each would get alone, and HTTP in front."""
