"""Low-bit quantization of weights and activations.

    ste.py                 straight-through estimators: surrogate gradients of rounding steps
    scales.py              Quantized(codes, scale); measured and learned scales
    arguments.py           arguments shared by all quantizers
    binary_weights.py multilevel_weights.py block_weights.py activations.py
                           the quantizers, one pure function each
    records.py registry.py the properties of a quantizer as a record; all records by name
    input_transforms.py    rotation before an activation quantizer, sparsity after it
    warmup.py              the passage from float to quantized in the first part of training
    precision.py           Precision: the quantizers of one linear layer
    recipes.py             precisions by name, and rules that assign them to the layers of a model

To add a quantizer, write its function and a record in registry.py: precisions, training, packing, the proof and the
energy table use the record.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
