"""Latent weights for a packed model: the inverse of `packing.pack`, for training on and as a float reference."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from bitnet_jax.models import Architecture, ModelConfig
from bitnet_jax.nn.embedding import rounded
from bitnet_jax.nn.tables import INTEGER_TABLES
from bitnet_jax.packed.packing import TABLES, Layer, PackingError, Variables, layers, quantize
from bitnet_kernels import PackedArray, dequantize, unpack

# Relative, of the scale that is measured on the latent weights: equal values summed one by one are all rounded alike,
# which adds up to half an ulp for each of the thousands that XLA sums in one go.
ROUNDING = 1e-3


def unpack_model(config: Architecture, variables: Variables) -> dict[str, Any]:
    """The variables of a packed model with latent weights in place of packed ones.

    Each latent matrix quantizes to exactly the stored codes, and to the stored scales up to float32 rounding (exactly
    where they are learned). Of a tied integer head, whose table the model still holds, only the codes are dropped.
    Tables are cast to float32, as all latent parameters are.

    Args:
      config: of the model.
      variables: {"params": ..., "packed": ...}; without "packed" they are returned as they are.

    Returns: {"params": ...}, and "batch_stats" if the model has them.

    Raises:
      PackingError: no latent matrix quantizes to the codes of a layer; the message names it.
    """
    flat = flatten_dict(dict(variables["params"]), sep="/")
    packed = flatten_dict(dict(variables.get("packed", {})), sep="/")
    for path, layer in layers(config).items():
        weight = packed.get(f"{path}/weight")
        if weight is None or layer.latent in flat:
            continue
        flat |= _latent(path, layer, weight)
    flat |= {path: flat[path].astype(jnp.float32) for path in TABLES if path in flat}
    others = {name: part for name, part in variables.items() if name not in ("params", "packed")}
    return {"params": unflatten_dict(flat, sep="/"), **others}


def with_float_tables(config: ModelConfig, variables: Variables) -> tuple[ModelConfig, Variables]:
    """A model whose integer embedding table, and an untied head like it, are float32 with the same values.

    For formats without such tables. Logits differ by the rounding of the head's input to 16 bits.
    """
    if config.embedding_dtype not in INTEGER_TABLES:
        return config, variables
    changed = dataclasses.replace(config, embedding_dtype="float32")
    params, packed = dict(variables["params"]), dict(variables.get("packed", {}))
    tables = {"embed": "embedding"}
    head = changed.precisions().get("lm_head")
    if head is not None and not head.quantizes_weights:  # untied, without a separate recipe
        tables["lm_head"] = "weight"
    for path, leaf in tables.items():
        if path in packed:
            params[path] = {leaf: dequantize(packed.pop(path)["weight"])}
        else:
            params[path] = {leaf: rounded(params[path][leaf], config.embedding_dtype)}
    return changed, {**variables, "params": params, **({"packed": packed} if "packed" in variables else {})}


def _latent(path: str, layer: Layer, weight: PackedArray) -> dict[str, Any]:
    """The parameters of one layer.

    Scales of quantizers double with their input, so the matrix of codes, times the stored over its own scale, has the
    stored scale. A quantizer with a minimum measures it, and the maximum, on the matrix itself.
    """
    n, k = weight.shape
    codes = np.asarray(unpack(weight), np.float32).reshape(n, weight.groups, -1)
    stored = np.asarray(weight.scale, np.float32)
    if weight.minimum is not None:
        values = codes * stored[..., None] + np.asarray(weight.minimum, np.float32)[..., None]
        parameters = {layer.latent: jnp.asarray(values.reshape(n, k))}
    elif layer.precision.scale == "learned":
        found = {layer.latent: codes * stored[..., None], f"{path}/weight_scale": stored}
        parameters = {name: jnp.asarray(value.reshape(n, -1)) for name, value in found.items()}
    else:
        own = np.asarray(quantize(path, layer, {layer.latent: jnp.asarray(codes.reshape(n, k))}).scale)
        # Where all codes are zero the quantizer's scale may be zero too.
        factor = np.divide(stored, own, out=np.ones_like(own * stored), where=own != 0)
        values = codes * factor[..., None]
        parameters = {layer.latent: jnp.asarray(values.reshape(n, k))}
    again = quantize(path, layer, parameters)
    same_codes = np.array_equal(np.asarray(again.codes), codes.reshape(n, k))
    # The scale of codes that are all zero is arbitrary.
    used = codes.any(axis=-1) if len(stored) == n else codes.any(axis=(0, 2)).reshape(1, -1)
    same_scales = np.allclose(np.asarray(again.scale)[used], stored[used], rtol=ROUNDING, atol=0)
    if weight.minimum is not None and again.minimum is not None:
        minimum = np.asarray(weight.minimum, np.float32)
        same_scales &= np.allclose(np.asarray(again.minimum), minimum, rtol=ROUNDING, atol=0)
    if not (same_codes and same_scales):
        raise PackingError(
            f"{path}: no latent weights of the quantizer {layer.precision.weight!r} have these "
            f"{'scales' if same_codes else 'codes'}; was the model packed with another quantizer, or are scales below "
            "the smallest that it computes?"
        )
    return parameters
