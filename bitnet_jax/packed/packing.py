"""Packing latent weights.

    check_packable  refuses a config whose layers cannot be packed, before training
    pack            quantizes each latent weight as its layer does, packs the codes, drops the latent weight
    with_head       the packed model with another output head, made from its table
    abstract        the variables of a packed model as shapes
    sizes           bytes of the packed model, by part

A packed model is {"params": float parameters, "packed": path -> {"weight": PackedArray}}, which `Transformer.apply`
accepts in place of {"params": ...}; models with batch norm also have {"batch_stats": ...}. proof.prove checks that it
is equal to the latent model.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, PyTree

from bitnet_jax.models import Architecture, ModelConfig, init_variables
from bitnet_jax.models.stacked import layer_precisions
from bitnet_jax.nn.config import table_precision
from bitnet_jax.nn.embedding import rounded, stored_dtype
from bitnet_jax.nn.head import QuantizedHead
from bitnet_jax.nn.linear import BitLinear
from bitnet_jax.quantization.precision import Precision
from bitnet_jax.quantization.scales import FLOAT16_MAX, Quantized
from bitnet_kernels import FORMATS, PackedArray, for_platform, unpack
from bitnet_kernels import pack as pack_codes
from bitnet_kernels.packed import codes_shape, validate_scale

Variables = Mapping[str, Any]
Precisions = Mapping[str, Precision]  # by the path of each linear layer
TABLES = ("embed/embedding", "position_embed/embedding", "lm_head/weight")


class PackingError(ValueError):
    """A weight cannot be packed, or a packed model differs from the model it was packed from."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Bytes of a model; `quantized_bfloat16` is the size of the packed matrices if stored in bfloat16."""

    packed: int
    embeddings: int  # including an untied float head
    other: int
    quantized_bfloat16: int

    @property
    def total(self) -> int:
        return self.packed + self.embeddings + self.other

    @property
    def packed_ratio(self) -> float:
        """Packed bytes of the quantized matrices over their bfloat16 bytes; NaN if nothing is packed."""
        return self.packed / self.quantized_bfloat16 if self.quantized_bfloat16 else float("nan")


@dataclasses.dataclass(frozen=True)
class Layer:
    """A linear layer to be packed."""

    precision: Precision
    shape: tuple[int, int]
    format: str | None  # of its packed codes; None: it keeps its latent weights
    latent: str  # path of the latent weights
    rounded_to: str = "float32"  # dtype they are rounded to first: embedding_dtype for an integer head


def layers(config: Architecture | Precisions, flat: Mapping[str, Any] | None = None) -> dict[str, Layer]:
    """Every linear layer by its path, and an integer embedding table, which is packed like one, as `embed`.

    Args:
      config: of a model; or the Precision of each linear layer by path (nn.linear.precisions_of collects them from
        any module), with weights [outputs, inputs] at `<path>/weight`.
      flat: path -> parameter, for the shapes of a model without a config.

    Raises:
      PackingError: there is no matrix at one of the paths.
    """
    if isinstance(config, Mapping):
        flat = flat or {}
        for path in config:
            weight = flat.get(f"{path}/weight")
            if weight is None or weight.ndim != 2:
                got = "none" if weight is None else f"{list(weight.shape)}"
                raise PackingError(
                    f"{path}/weight: got {got}, expected the matrix [outputs, inputs] of a BitLinear"
                )
        return {
            path: Layer(precision, flat[f"{path}/weight"].shape, precision.packed_format, f"{path}/weight")
            for path, precision in config.items()
        }
    formats, precisions = config.packed_formats(), config.precisions()
    found = {}
    for path, shape in config.linear_shapes().items():
        integer_head = isinstance(config, ModelConfig) and path == "lm_head" and config.head != "float"
        rounded_to = config.embedding_dtype if integer_head else "float32"  # type: ignore[attr-defined]
        found[path] = Layer(precisions[path], shape, formats.get(path), latent_path(config, path), rounded_to)
    if isinstance(config, ModelConfig):
        table = table_precision(config.embedding_dtype, config.hidden_size)
        if table is not None:
            shape = (config.vocab_size, config.hidden_size)
            found["embed"] = Layer(table, shape, table.packed_format, "embed/embedding")
    return found


def pack(params: PyTree, config: Architecture | Precisions) -> dict[str, Any]:
    """Packs every linear layer whose Precision has a packed format; the others keep their latent weights.

    Embeddings and a float head of a Transformer are stored in config.embedding_dtype, to which their forward pass
    rounds them anyway; integers are packed.

    Args:
      params: latent parameters, nested or flat dicts of a flax module.
      config: of the model; or, for any flax module with BitLinear layers, the Precision of each by path.

    Returns: {"params": ..., "packed": ...}.

    Raises:
      PackingError: a weight is missing, has the wrong shape or contains NaN, or its packed format cannot hold its
        codes or scales. The message names the path.
    """

    def matrix(path: str, layer: Layer, format: str, flat: Mapping[str, Any]) -> PackedArray:
        return _pack_one(path, quantize(path, layer, flat), format, layer.precision.scale_dtype)

    return _packed(params, config, matrix)


def _packed(
    params: PyTree,
    config: Architecture | Precisions,
    matrix: Callable[[str, Layer, str, Mapping[str, Any]], PackedArray],
) -> dict[str, Any]:
    """`pack` with `matrix(path, layer, format, flat params)` for each layer that has a format."""
    flat = flatten_dict(dict(params), sep="/")
    linear, packed = layers(config, flat), {}
    for path, layer in linear.items():
        _check_packable(path, layer)
    for path, layer in linear.items():
        weight = flat.get(layer.latent)
        if weight is None or weight.shape != layer.shape:
            got = "none" if weight is None else f"{list(weight.shape)}"
            raise PackingError(
                f"{layer.latent}: got {got}, expected {list(layer.shape)}; do params and config belong together?"
            )
        if layer.format is None:
            continue
        packed[f"{path}/weight"] = matrix(path, layer, layer.format, flat)
        if layer.latent.startswith(f"{path}/"):  # not the embedding of a tied head
            flat.pop(layer.latent)
        flat.pop(f"{path}/weight_scale", None)
    if isinstance(config, ModelConfig):
        for path in TABLES:
            if path in flat:
                flat[path] = flat[path].astype(stored_dtype(config, path.split("/")[0]))
    return {"params": unflatten_dict(flat, sep="/"), "packed": unflatten_dict(packed, sep="/")}


def check_packable(config: Architecture) -> None:
    """Checks, from shapes alone, that `pack` can store the scales and inputs of every linear layer.

    Raises:
      PackingError: a group size that does not divide the inputs of a layer or is not a multiple of 32, or more inputs
        per scale than its format can accumulate.
    """
    for path, layer in layers(config).items():
        _check_packable(path, layer)


def _check_packable(path: str, layer: Layer) -> None:
    if layer.format is None:
        return
    granularity, (n, k) = layer.precision.granularity, layer.shape
    size = granularity if isinstance(granularity, int) else k
    if k % size:
        raise PackingError(
            f"{path}: got granularity={granularity} for {k} inputs, expected a group size that divides {k}"
        )
    try:
        validate_scale(_abstract_scale(layer), (n, k))
    except ValueError as error:
        raise PackingError(f"{path}: granularity={granularity!r} cannot be packed: {error}") from error
    if size > (most := FORMATS[layer.format].max_inputs):
        raise PackingError(
            f"{path}: got {size} inputs per scale, expected at most {most} in the format {layer.format}; choose "
            "a smaller granularity"
        )


def _abstract_scale(layer: Layer) -> Any:
    granularity, (n, k) = layer.precision.granularity, layer.shape
    groups = k // granularity if isinstance(granularity, int) else 1
    return jax.ShapeDtypeStruct((1 if granularity == "tensor" else n, groups), layer.precision.scale_dtype)


def with_head(config: ModelConfig, variables: Variables, head: str) -> tuple[ModelConfig, dict[str, Any]]:
    """A packed model with another head ("float", "int8" or "int4"), made from its table; the rest is shared.

    Raises:
      PackingError: the table is not available: it was not tied, and packing kept only its codes.
      ValueError: ModelConfig does not allow this head.
    """
    changed = dataclasses.replace(config, head=head)
    params, packed = dict(variables["params"]), dict(variables.get("packed", {}))
    if head == config.head:
        return config, {**variables, "params": params, "packed": packed}
    if not config.tie_embeddings and config.head != "float":
        raise PackingError(
            f"lm_head/weight: got {config.head} codes, expected the float table; pack the latent model again"
        )
    packed.pop("lm_head", None)
    if head != "float":
        layer = layers(changed)["lm_head"]
        codes = quantize("lm_head", layer, flatten_dict(params, sep="/"))
        packed["lm_head"] = {"weight": _pack_one("lm_head", codes, head, layer.precision.scale_dtype)}
        params.pop("lm_head", None)
    return changed, {"params": params, "packed": packed}


def for_this_platform(variables: Variables) -> dict[str, Any]:
    """Converts packed matrices to the layout of this platform's kernels; on a CPU they are unchanged."""
    return jax.tree.map(
        lambda leaf: for_platform(leaf) if isinstance(leaf, PackedArray) else leaf,
        dict(variables),
        is_leaf=lambda leaf: isinstance(leaf, PackedArray),
    )


@functools.lru_cache(maxsize=8)
def abstract(config: Architecture) -> dict[str, Any]:
    """The variables of a packed model, batch statistics included, as shapes and dtypes; nothing is computed.

    Layers of a Transformer with the same precisions have the same shapes, so one of each kind is traced, whatever
    the depth.
    """
    if not isinstance(config, ModelConfig):
        return _trace(config)
    # Precisions of a layer -> its index in the traced model.
    kinds: dict[tuple[tuple[str, Precision], ...], int] = {}
    kind_of = [kinds.setdefault(tuple(layer.items()), len(kinds)) for layer in layer_precisions(config)]
    float_head = dataclasses.replace(config, head="float")  # other heads are set by `head`, not by a rule
    heads = [
        (path, value)
        for path, value in float_head.precisions().items()
        if not path.startswith("layers_") and path != "patch_embed"  # set by the field `first`
    ]
    rules = [(f"layers_{i}/{path}", value) for layer, i in kinds.items() for path, value in layer]
    traced = _trace(
        dataclasses.replace(
            config,
            num_layers=len(kinds),
            no_rope_layers=(),  # indices in the whole model; shapes do not depend on them
            precision=(*rules, *heads),
        )
    )

    def deepened(variables: dict[str, Any]) -> dict[str, Any]:
        outside = {name: part for name, part in variables.items() if not name.startswith("layers_")}
        layers = {
            f"layers_{i}": variables[f"layers_{kind}"]
            for i, kind in enumerate(kind_of)
            if f"layers_{kind}" in variables  # a layer may have no arrays in a collection
        }
        return outside | layers

    return {collection: deepened(variables) for collection, variables in traced.items()}


def _trace(config: Architecture) -> dict[str, Any]:
    """Traces what declares variables, but neither products nor quantizers, whose results have known shapes: that would
    take most of the time to load a small model."""

    def declared(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module, method = context.module, context.method_name
        if (type(module), method) in ((BitLinear, "_product"), (QuantizedHead, "__call__")):
            return module.declared(*args)
        return call(*args, **kwargs)

    def matrix(path: str, layer: Layer, format: str, flat: Mapping[str, Any]) -> PackedArray:
        abstract = _abstract_scale(layer)
        codes = jnp.zeros(codes_shape(format, layer.shape, abstract.shape[1]), jnp.uint8)
        scale = jnp.zeros(abstract.shape, abstract.dtype)
        return PackedArray(
            codes, scale, format, "panel16", layer.shape, scale if FORMATS[format].has_minimum else None
        )

    def packed() -> dict[str, Any]:
        with nn.intercept_methods(declared):
            variables = init_variables(config, jax.random.key(0))
        return variables | _packed(variables["params"], config, matrix)

    return jax.eval_shape(packed)


@functools.partial(jax.jit, static_argnums=0)
def _quantize_jitted(precision: Precision, weight: Array, scale: Array | None) -> Quantized:
    return precision.quantize_weight(weight, scale=scale)


def latent_path(config: Architecture, path: str) -> str:
    """The path of the latent weights of the linear layer at `path`."""
    tied = isinstance(config, ModelConfig) and path == "lm_head" and config.tie_embeddings
    return "embed/embedding" if tied else f"{path}/weight"


def quantize(path: str, layer: Layer, flat: Mapping[str, Any]) -> Quantized:
    """Codes and scale as the latent layer computes them: by the same function, also jitted.

    Raises:
      PackingError: the quantizer rejects the weights.
    """
    weight = rounded(flat[layer.latent], layer.rounded_to)
    try:
        return _quantize_jitted(layer.precision, weight, flat.get(f"{path}/weight_scale"))
    except ValueError as error:
        raise PackingError(f"{path}: {error}") from error


def _pack_one(path: str, quantized: Quantized, format: str, scale_dtype: str) -> PackedArray:
    values = FORMATS[format].values
    concrete = not isinstance(quantized.codes, jax.core.Tracer)
    if concrete and not all(np.isfinite(np.asarray(part)).all() for part in _scales(quantized)):
        beyond = f", or scales beyond the {FLOAT16_MAX:g} of float16" if scale_dtype == "float16" else ""
        raise PackingError(
            f"{path}: the weights or scales contain NaN or infinity{beyond}; pack an earlier checkpoint"
        )
    # Checked as floats: a cast to int8 would turn NaN or 0.5 into a code.
    if concrete and not np.isin(np.asarray(quantized.codes), values).all():
        raise PackingError(
            f"{path}: got codes {np.unique(np.asarray(quantized.codes))[:5]} from the quantizer, "
            f"expected only {list(values)} in the format {format}"
        )
    try:
        # Exact: the quantizer has rounded them to this dtype.
        scale, *minimum = (part.astype(scale_dtype) for part in _scales(quantized))
        packed = pack_codes(
            quantized.codes.astype(jnp.int8), scale, format, minimum=minimum[0] if minimum else None
        )
    except ValueError as error:
        raise PackingError(f"{path}: {error}") from error
    if concrete:
        check_codes(path, packed, quantized)
    return packed


def _scales(weight: Quantized | PackedArray) -> list[Array]:
    """The scale and, if there is one, the minimum."""
    return [part for part in (weight.scale, weight.minimum) if part is not None]


def check_codes(path: str, packed: PackedArray, quantized: Quantized) -> None:
    """Raises PackingError unless a packed matrix has exactly these codes, scales and minima."""
    codes, expected = np.asarray(unpack(packed)), np.asarray(quantized.codes)
    if codes.shape != expected.shape:
        raise PackingError(f"{path}: the packed matrix is {codes.shape}, the latent one {expected.shape}")
    if (codes != expected).any():
        row, column = np.argwhere(codes != expected)[0]
        raise PackingError(
            f"{path}: code [{row}, {column}] is {codes[row, column]} packed and {expected[row, column]:g} "
            f"latent ({(codes != expected).sum()} of {codes.size} differ)"
        )
    ours, theirs = _scales(packed), _scales(quantized)
    for name, one, other in zip(("scale", "minimum"), ours, theirs, strict=False):
        if not np.array_equal(np.asarray(one), np.asarray(other)):
            raise PackingError(f"{path}: the packed {name} differs from the latent one")
    if len(ours) != len(theirs):
        raise PackingError(f"{path}: only one of the packed and the latent matrix has a minimum")


def sizes(variables: Variables) -> Sizes:
    """Bytes by part of a packed, latent or `abstract` model; batch statistics count as other."""
    flat = flatten_dict(dict(variables["params"]), sep="/")
    nbytes = {path: leaf.size * leaf.dtype.itemsize for path, leaf in flat.items()}
    statistics = jax.tree.leaves(variables.get("batch_stats", {}))
    weights = flatten_dict(dict(variables.get("packed", {})), sep="/")
    table = weights.pop("embed/weight", None)
    tables = sum(nbytes.get(path, 0) for path in TABLES)
    return Sizes(
        packed=sum(weight.nbytes for weight in weights.values()),
        embeddings=tables + (0 if table is None else table.nbytes),
        other=sum(nbytes.values()) - tables + sum(leaf.size * leaf.dtype.itemsize for leaf in statistics),
        quantized_bfloat16=sum(2 * weight.shape[0] * weight.shape[1] for weight in weights.values()),
    )
