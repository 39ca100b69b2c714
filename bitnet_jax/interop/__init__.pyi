from .huggingface import load, tensor_names

__all__ = ["load", "tensor_names"]
