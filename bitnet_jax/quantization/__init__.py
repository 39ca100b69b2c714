"""Real numbers to few bits.

    ste.py                 straight-through estimators: the gradient of a step that has none
    scales.py              Quantized(codes, scale); what a scale is, measured or learned
    arguments.py           what a layer tells any quantizer
    binary_weights.py multilevel_weights.py activations.py
                           the quantizers: one pure function each
    records.py registry.py what there is to know about a quantizer, one record each; all of them by name
    input_transforms.py    a rotation before the quantizer of an input, sparsity after it
    precision.py           Precision: which quantizers a linear layer uses
    recipes.py             precisions by name, and rules that give each layer of a model its own

To add a quantizer, write its function and one record in registry.py: precisions, training, packing, the proof and the
energy table ask the record.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
