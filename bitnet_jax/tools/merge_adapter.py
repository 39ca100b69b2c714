"""Merging a low-rank adapter into the weights of its model, and what of it survives.

In a layer of floats W + scale b a takes the place of W. A quantized layer rounds the sum to its codes: a change smaller
than half a step between two codes is lost, and scales that are measured move. `Survived` says how much of it is lost:

    lost = |Q(W + D) - W - D| / |D|      D = scale b a, the norms Frobenius's: 0 nothing, 1 as much as the change itself
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from bitnet_jax.model_folders import LoadedModel
from bitnet_jax.models import ModelConfig
from bitnet_jax.packed.adapters import Adapter
from bitnet_jax.packed.latent import unpack_model
from bitnet_jax.packed.packing import layers, quantize


@dataclasses.dataclass(frozen=True)
class Survived:
    """Of one quantized layer."""

    codes: int
    changed: int  # codes that differ after the merge
    lost: float


def merge(
    model: LoadedModel[ModelConfig], adapter: Adapter, on_layer: Callable[[], None] = lambda: None
) -> tuple[LoadedModel[ModelConfig], dict[str, Survived]]:
    """The model with latent weights that contain the adapter, and what survives in each quantized layer, by its path.

    Args:
      model: a packed one.
      on_layer: called after each adapted layer.

    Raises:
      PackingError: a quantizer rejects the new weights, or no latent weights have the codes of a layer.
    """
    latent = unpack_model(model.config, model.variables)
    flat, found = flatten_dict(latent["params"], sep="/"), {}
    known = layers(model.config)
    for path, (a, b) in adapter.layers.items():
        layer, before = known[path], flat[known[path].latent]
        change = adapter.scale * (jnp.asarray(b, jnp.float32) @ jnp.asarray(a, jnp.float32))
        # A learned scale divides its latent weights, a measured one is measured on them: both round the sum.
        flat[layer.latent] = before + change
        if layer.precision.quantizes_weights:
            old = quantize(path, layer, flat | {layer.latent: before})
            new = quantize(path, layer, flat)
            lost = jnp.linalg.norm(new.dequantize() - old.dequantize() - change) / jnp.linalg.norm(change)
            changed = int(jnp.sum(old.codes != new.codes))
            found[path] = Survived(old.codes.size, changed, float(jnp.nan_to_num(lost)))
        on_layer()
    merged = {**latent, "params": unflatten_dict(flat, sep="/")}
    return model._replace(kind="merged", variables=merged), found


def summary(survived: Mapping[str, Survived]) -> dict[str, Any]:
    """Codes in all, those that change, their share, and the median of `lost`; {} if no layer is quantized."""
    if not survived:
        return {}
    codes, changed = (sum(getattr(one, name) for one in survived.values()) for name in ("codes", "changed"))
    return {
        "layers": len(survived),
        "codes": codes,
        "changed": changed,
        "share": changed / codes,
        "lost": float(np.median([one.lost for one in survived.values()])),
    }
