"""From latent weights to packed ones, and the proof that both are the same model.

    check_packable  refuses a config whose layers could not be packed, before anything is trained
    pack        quantizes each latent weight as its layer would, packs the codes, drops the latent
    with_head   the packed model with another output head, made from its table
    prove       latent against packed: same codes, same logits, same greedy text; raises at the first difference
    sizes       what the packed model weighs, part by part

A packed model is {"params": what stays float, "packed": path -> {"weight": PackedArray}}, the variables that
`Transformer.apply` takes in place of {"params": ...}. Models with batch norm keep its statistics beside both, in
{"batch_stats": ...}.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Bool, Float, Int

from bitnet_jax.models import build_model, init_variables
from bitnet_jax.nn.config import Architecture, ModelConfig
from bitnet_jax.nn.embedding import rounded
from bitnet_jax.quantization.precision import Precision
from bitnet_jax.quantization.registry import Quantized
from bitnet_kernels import FORMATS, PackedArray, for_platform, unpack
from bitnet_kernels import pack as pack_codes
from bitnet_kernels.packed import validate_scale

Variables = Mapping[str, Any]
TABLES = ("embed/embedding", "position_embed/embedding", "lm_head/weight")
LOGIT_TOLERANCE = 1e-5  # relative to the largest logit; both sides do the same float32 work behind exact sums


class PackingError(ValueError):
    """A weight cannot be packed, or a packed model is not the model it was packed from."""


@dataclasses.dataclass(frozen=True)
class Proof:
    """What `prove` found; it is only ever returned when everything held."""

    matrices: int  # packed matrices, each unpacked again to identical codes
    max_relative_logit_error: float  # max |difference| / max |latent logit|
    logits: int  # compared
    tokens_identical: int  # greedy tokens, all of them identical


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Bytes of a model; `quantized_bfloat16` is what the packed matrices would take in bfloat16."""

    packed: int
    embeddings: int  # and the float head, where it is a table of its own
    other: int
    quantized_bfloat16: int

    @property
    def total(self) -> int:
        return self.packed + self.embeddings + self.other

    @property
    def packed_ratio(self) -> float:
        """Packed bytes of the quantized matrices over their bfloat16 bytes; NaN where nothing is packed."""
        return self.packed / self.quantized_bfloat16 if self.quantized_bfloat16 else float("nan")


def pack(params: Mapping[str, Any], config: Architecture) -> dict[str, Any]:
    """Packs every linear layer whose Precision has a packed form; the others keep their latent weights.

    Embeddings and a float head of a Transformer are stored in config.embedding_dtype, the rounding their forward
    pass does anyway.

    Returns: {"params": ..., "packed": ...}.

    Raises:
      PackingError: a weight is missing, has the wrong shape or holds NaN, or its packed form cannot hold its
        codes or scales. The message names the path.
    """
    check_packable(config)
    flat = {"/".join(path): leaf for path, leaf in flatten_dict(dict(params)).items()}
    formats, packed = config.packed_formats(), {}
    for path, shape in config.linear_shapes().items():
        name = latent_path(config, path)
        weight = flat.get(name)
        if weight is None or weight.shape != shape:
            got = "none" if weight is None else f"{list(weight.shape)}"
            raise PackingError(
                f"{name}: got {got}, expected {list(shape)}; do params and config belong together?"
            )
        if path not in formats:
            continue
        quantized = _quantize(config, flat, path)
        flat.pop(f"{path}/weight", None)  # a tied head leaves the embedding
        flat.pop(f"{path}/weight_scale", None)
        packed[f"{path}/weight"] = _pack_one(path, quantized, formats[path])
    if isinstance(config, ModelConfig):
        for path in TABLES:
            if path in flat:
                flat[path] = flat[path].astype(config.embedding_dtype)
    return {"params": _nested(flat), "packed": _nested(packed)}


def check_packable(config: Architecture) -> None:
    """Whether `pack` could store the scales and inputs of every linear layer, known from shapes alone.

    Raises:
      PackingError: a group size that does not divide the inputs of a layer or is no multiple of 32, or more inputs
        to a scale than its format can add up.
    """
    precisions, shapes = config.precisions(), config.linear_shapes()
    for path, format in config.packed_formats().items():
        granularity, (n, k) = precisions[path].granularity, shapes[path]
        size = granularity if isinstance(granularity, int) else k
        if k % size:
            raise PackingError(
                f"{path}: got granularity={granularity} for {k} inputs, expected a group size that divides {k}"
            )
        scale: Any = jax.ShapeDtypeStruct((1 if granularity == "tensor" else n, k // size), jnp.float32)
        try:
            validate_scale(scale, (n, k))
        except ValueError as error:
            raise PackingError(f"{path}: granularity={granularity!r} cannot be packed: {error}") from error
        if size > (most := FORMATS[format].max_inputs):
            raise PackingError(
                f"{path}: got {size} inputs to a scale, expected at most {most} in the format {format}; choose "
                "a smaller granularity"
            )


def with_head(config: ModelConfig, variables: Variables, head: str) -> tuple[ModelConfig, dict[str, Any]]:
    """A packed model with another head ("float", "int8" or "int4"), made from its table; the rest is shared.

    Raises:
      PackingError: the table is gone: it was not tied, and packing kept its codes alone.
      ValueError: ModelConfig cannot have this head.
    """
    changed = dataclasses.replace(config, head=head)
    params, packed = dict(variables["params"]), dict(variables.get("packed", {}))
    if head == config.head:
        return config, {**variables, "params": params, "packed": packed}
    if not config.tie_embeddings and config.head != "float":
        raise PackingError(
            f"lm_head/weight: got {config.head} codes, expected the table itself; pack the latent model again"
        )
    packed.pop("lm_head", None)
    if head != "float":
        flat = {"/".join(path): leaf for path, leaf in flatten_dict(params).items()}
        packed["lm_head"] = {"weight": _pack_one("lm_head", _quantize(changed, flat, "lm_head"), head)}
        params.pop("lm_head", None)
    return changed, {"params": params, "packed": packed}


def for_this_platform(variables: Variables) -> dict[str, Any]:
    """Packed matrices in the layout of the kernels at hand; on a CPU they stay as they are."""
    return jax.tree.map(
        lambda leaf: for_platform(leaf) if isinstance(leaf, PackedArray) else leaf,
        dict(variables),
        is_leaf=lambda leaf: isinstance(leaf, PackedArray),
    )


@functools.lru_cache(maxsize=8)
def abstract(config: Architecture) -> dict[str, Any]:
    """The variables of a packed model, batch statistics included, as shapes and dtypes; nothing is computed.

    Layers of a Transformer with the same precisions have the same shapes, so one of each kind is traced, however
    deep the model.
    """
    if not isinstance(config, ModelConfig):
        return _trace(config)
    kinds: dict[
        tuple[tuple[str, Precision], ...], int
    ] = {}  # a layer's precisions -> its place in the traced model
    kind_of = [kinds.setdefault(layer, len(kinds)) for layer in _layers(config)]
    float_head = dataclasses.replace(config, head="float")  # another one comes by `head`, not by a rule
    heads = [
        (path, value)
        for path, value in float_head.precisions().items()
        if not path.startswith("layers_") and path != "patch_embed"  # which has a field, `first`
    ]
    rules = [(f"layers_{i}/{path}", value) for layer, i in kinds.items() for path, value in layer]
    traced = _trace(dataclasses.replace(config, num_layers=len(kinds), precision=(*rules, *heads)))

    def deepened(variables: dict[str, Any]) -> dict[str, Any]:
        outside = {name: part for name, part in variables.items() if not name.startswith("layers_")}
        layers = {
            f"layers_{i}": variables[f"layers_{kind}"]
            for i, kind in enumerate(kind_of)
            if f"layers_{kind}"
            in variables  # a collection has no entry for a layer without any of its arrays
        }
        return outside | layers

    return {collection: deepened(variables) for collection, variables in traced.items()}


def _layers(config: ModelConfig) -> list[tuple[tuple[str, Precision], ...]]:
    """The (path in the layer, Precision) pairs of each layer."""
    layers: list[dict[str, Precision]] = [{} for _ in range(config.num_layers)]
    for path, precision in config.precisions().items():
        layer, _, inside = path.partition("/")
        if layer.startswith("layers_"):
            layers[int(layer.removeprefix("layers_"))][inside] = precision
    return [tuple(layer.items()) for layer in layers]


def _trace(config: Architecture) -> dict[str, Any]:
    def packed() -> dict[str, Any]:
        variables = init_variables(config, jax.random.key(0))
        return variables | pack(variables["params"], config)

    return jax.eval_shape(packed)


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    return unflatten_dict({tuple(path.split("/")): leaf for path, leaf in flat.items()})


@functools.partial(jax.jit, static_argnums=0)
def _quantize_jitted(precision: Precision, weight: Array, scale: Array | None) -> Quantized:
    return precision.quantize_weight(weight, scale=scale)


def latent_path(config: Architecture, path: str) -> str:
    """Where the latent weights of the linear layer at `path` are."""
    tied = isinstance(config, ModelConfig) and path == "lm_head" and config.tie_embeddings
    return "embed/embedding" if tied else f"{path}/weight"


def _quantize(config: Architecture, flat: Mapping[str, Any], path: str) -> Quantized:
    """Codes and scale as the latent layer at `path` computes them: the same function, also compiled."""
    weight = flat[latent_path(config, path)]
    if isinstance(config, ModelConfig) and path == "lm_head" and config.head != "float":
        weight = rounded(weight, config.embedding_dtype)
    try:
        return _quantize_jitted(config.precisions()[path], weight, flat.get(f"{path}/weight_scale"))
    except ValueError as error:
        raise PackingError(f"{path}: {error}") from error


def _pack_one(path: str, quantized: Quantized, format: str) -> PackedArray:
    values = FORMATS[format].values
    concrete = not isinstance(quantized.codes, jax.core.Tracer)
    if concrete and not np.isfinite(np.asarray(quantized.scale)).all():
        raise PackingError(f"{path}: the weights or scales hold NaN or infinity; pack an earlier checkpoint")
    # Looked at as floats: a cast to int8 would turn NaN or 0.5 into a code.
    if concrete and not np.isin(np.asarray(quantized.codes), values).all():
        raise PackingError(
            f"{path}: the quantizer gave codes {np.unique(np.asarray(quantized.codes))[:5]}, "
            f"the format {format} holds only {list(values)}"
        )
    try:
        packed = pack_codes(quantized.codes.astype(jnp.int8), quantized.scale, format)
    except ValueError as error:
        raise PackingError(f"{path}: {error}") from error
    if concrete:
        _check_codes(path, packed, quantized)
    return packed


def _check_codes(path: str, packed: PackedArray, quantized: Quantized) -> None:
    codes, expected = np.asarray(unpack(packed)), np.asarray(quantized.codes)
    if codes.shape != expected.shape:
        raise PackingError(f"{path}: the packed matrix is {codes.shape}, the latent one {expected.shape}")
    if (codes != expected).any():
        row, column = np.argwhere(codes != expected)[0]
        raise PackingError(
            f"{path}: code [{row}, {column}] is {codes[row, column]} packed and {expected[row, column]:g} "
            f"latent ({(codes != expected).sum()} of {codes.size} differ)"
        )
    if not np.array_equal(np.asarray(packed.scale), np.asarray(quantized.scale)):
        raise PackingError(f"{path}: the packed scale differs from the latent one")


def prove(
    config: Architecture,
    latent: Variables,
    packed: Variables,
    inputs: Int[Array | np.ndarray, "B T"] | Float[Array | np.ndarray, "B height width C"],
    mask: Bool[Array | np.ndarray, "B T"] | None = None,
    *,
    greedy: Callable[..., Array | np.ndarray] | None = None,
    new_tokens: int = 0,
    tolerance: float = LOGIT_TOLERANCE,
) -> Proof:
    """Proves that `packed` is the model `latent`, or raises.

    Args:
      latent: {"params": latent parameters}, and "batch_stats" if the model has them.
      packed: {"params": ..., "packed": ...}, made by `pack` or loaded from a file, and the same "batch_stats".
      inputs, mask: prompts for the model, padded on the left, or images; their logits are compared.
      greedy: (config, variables, tokens, mask, n) -> n greedy tokens [B, n], in practice
        `inference.generate.greedy`; handed in, so that packing knows nothing of generation.
      new_tokens: tokens to continue *each* prompt by.
      tolerance: on the largest difference of logits, relative to the largest logit.

    Raises:
      PackingError: with the first path, position or token at which the two differ.
      ValueError: new_tokens without a way to generate them.
    """
    if new_tokens and greedy is None:
        raise ValueError(f"new_tokens={new_tokens} needs greedy=inference.generate.greedy")
    matrices = _prove_codes(config, latent["params"], packed.get("packed", {}))
    error, count = _prove_logits(config, latent, packed, inputs, mask, tolerance)
    identical = 0
    if new_tokens and greedy is not None:
        ours = np.asarray(greedy(config, packed, inputs, mask, new_tokens))
        theirs = np.asarray(greedy(config, latent, inputs, mask, new_tokens))
        if (ours != theirs).any():
            # By time first: later differences of a row follow from its first one.
            position, row = np.argwhere((ours != theirs).T)[0]
            raise PackingError(
                f"greedy token {position} of prompt {row} is {ours[row, position]} packed and "
                f"{theirs[row, position]} latent ({(ours == theirs).sum()} of {ours.size} tokens agree)"
            )
        identical = ours.size
    return Proof(matrices, error, count, identical)


def _prove_codes(config: Architecture, params: Mapping[str, Any], packed: Mapping[str, Any]) -> int:
    flat = {"/".join(path): leaf for path, leaf in flatten_dict(dict(params)).items()}
    weights = {"/".join(path): leaf for path, leaf in flatten_dict(dict(packed)).items()}
    formats = config.packed_formats()
    expected = {f"{path}/weight" for path in formats}
    if weights.keys() != expected:
        differing = sorted(weights.keys() ^ expected)[0]
        state = "missing from" if differing in expected else "unexpected in"
        raise PackingError(
            f"{differing} is {state} the packed model; its config asks for {len(expected)} in all"
        )
    for name, weight in weights.items():
        path = name.removesuffix("/weight")
        wanted = formats[path]
        if weight.format != wanted:
            raise PackingError(f"{path}: the packed format is {weight.format}, expected {wanted}")
        _check_codes(path, weight, _quantize(config, flat, path))
    return len(weights)


@functools.partial(jax.jit, static_argnums=0)
def _logits(config: Architecture, variables: Variables, inputs: Array, mask: Array | None) -> Array:
    masked: dict[str, Any] = {} if mask is None else {"mask": mask}
    output: Any = build_model(config).apply(variables, inputs, **masked)
    return output.logits


def _prove_logits(
    config: Architecture, latent: Variables, packed: Variables, inputs: Any, mask: Any, tolerance: float
) -> tuple[float, int]:
    inputs = jnp.asarray(inputs)
    mask = None if mask is None else jnp.asarray(mask, bool)
    float_part = {name: part for name, part in latent.items() if name != "packed"}
    theirs = np.asarray(_logits(config, float_part, inputs, mask))
    ours = np.asarray(_logits(config, dict(packed), inputs, mask))
    if not np.isfinite(theirs).all():
        raise PackingError("the latent model gives NaN or infinite logits; nothing can be proved about it")
    # A row of padding says nothing, and a language model has one logit vector per token.
    if mask is not None and theirs.ndim == 3:
        theirs, ours = theirs[np.asarray(mask)], ours[np.asarray(mask)]
    difference = np.abs(ours - theirs)
    error = float(difference.max() / max(np.abs(theirs).max(), np.finfo(np.float32).tiny))
    if not error <= tolerance:  # also when it is NaN
        where = np.unravel_index(np.nanargmax(np.nan_to_num(difference, nan=np.inf)), difference.shape)
        raise PackingError(
            f"logits differ by {error:.3g} of the largest, expected at most {tolerance:g}; the worst, at "
            f"index {[int(i) for i in where]}, is {ours[where]:.8g} packed and {theirs[where]:.8g} latent"
        )
    return error, theirs.size


def sizes(variables: Variables) -> Sizes:
    """Bytes by part of a packed, a latent (nothing packed) or an `abstract` model; statistics count as other."""
    flat = {"/".join(path): leaf for path, leaf in flatten_dict(dict(variables["params"])).items()}
    nbytes = {path: leaf.size * leaf.dtype.itemsize for path, leaf in flat.items()}
    statistics = jax.tree.leaves(variables.get("batch_stats", {}))
    weights = flatten_dict(dict(variables.get("packed", {}))).values()
    embeddings = sum(nbytes.get(path, 0) for path in TABLES)
    return Sizes(
        packed=sum(weight.nbytes for weight in weights),
        embeddings=embeddings,
        other=sum(nbytes.values()) - embeddings + sum(leaf.size * leaf.dtype.itemsize for leaf in statistics),
        quantized_bfloat16=sum(2 * weight.shape[0] * weight.shape[1] for weight in weights),
    )
