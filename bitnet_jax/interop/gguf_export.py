"""(ModelConfig, variables) -> a GGUF file for llama.cpp or the fork of microsoft/BitNet, and for `gguf.read`."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

from bitnet_jax.interop import gguf_types, gguf_writer
from bitnet_jax.interop.gguf import TABLES, row_order, tensor_names
from bitnet_jax.interop.gguf_config import FAMILIES, family_of, metadata_of
from bitnet_jax.interop.gguf_file import Value
from bitnet_jax.interop.gguf_ternary import Ternary, encode_ternary
from bitnet_jax.interop.gguf_types import TERNARY, TensorType, named_type
from bitnet_jax.interop.gguf_writer import NewTensor
from bitnet_jax.models import ModelConfig
from bitnet_jax.nn.embedding import rounded
from bitnet_jax.packed import packing
from bitnet_jax.packed.latent import with_float_tables
from bitnet_jax.quantization.precision import Precision
from bitnet_jax.quantization.recipes import RECIPES
from bitnet_kernels import PackedArray, unpack

# general.file_type of the type that most matrices have.
_FILE_TYPES = {
    "F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "BF16": 32, "TQ1_0": 36, "TQ2_0": 37,
    "i2_s": 40,
}  # fmt: skip


# Types that hold an integer table exactly, by the embedding_dtype of the config.
_TABLE_TYPES = {"int8": "Q8_0", "int4": "Q4_0", "uint4": "Q4_1"}


def write(
    path: str | Path,
    config: ModelConfig,
    variables: Mapping[str, Any],
    *,
    type: str | None = None,
    embedding: str | None = None,
    metadata: Mapping[str, Value] | None = None,
    name: str = "bitnet_jax",
    overwrite: bool = False,
) -> None:
    """Writes a model, one tensor in memory at a time; a latent model is packed first.

    Args:
      type: of the matrices in the layers, for those that it can hold. Default: i2_s for ternary ones, and the smallest
        exact one of F16, BF16 and F32 for float ones. TQ1_0 and TQ2_0 round scales to float16.
      embedding: type of the embedding and of an untied head; None: the smallest exact one.
      metadata: further entries, such as those of `gguf_tokenizer_export.metadata_of`.
      name: general.name.
      overwrite: replace an existing file.

    Raises:
      ValueError: the format has no key or architecture for a setting of the config, no type for the weights (one line
        that names it), a value is not finite, or `type` fits no matrix.
      StorageError: the file exists or cannot be written.
    """
    embedding = embedding or _TABLE_TYPES.get(config.embedding_dtype)
    config, variables = with_float_tables(config, variables)
    architecture = family_of(config)
    precisions = {path: p for path, p in config.precisions().items() if path != "lm_head"}
    for layer, precision in precisions.items():
        _check_precision(layer, precision)
    if (head := config.precisions().get("lm_head")) is not None and head.quantizes_weights:
        raise ValueError(
            f"lm_head: the precision has weight={head.weight!r}, expected a float head, which is what programs compute "
            "with output.weight of a GGUF file"
        )
    if any(p.quantizes_weights for p in precisions.values()) and "packed" not in variables:
        variables = packing.pack(variables["params"], config)
    packed = flatten_dict(dict(variables.get("packed", {})), sep="/")
    leaves = flatten_dict(dict(variables["params"]), sep="/") | packed
    # No key says that the model rounds its tables, so the file has them rounded.
    for table in TABLES:
        if table in leaves and str(leaves[table].dtype) != config.embedding_dtype:
            leaves[table] = rounded(leaves[table], config.embedding_dtype)
    ternary = {f"{layer}/weight" in packed for layer in precisions}
    if type is not None and (named_type(type).name in TERNARY) not in ternary:
        raise ValueError(
            f"type={type!r} is for {'float' if True in ternary else 'ternary'} matrices; the model has none"
        )
    tensors = []
    for leaf, (tensor_name, shape) in tensor_names(config).items():
        weight, order = leaves[leaf], row_order(leaf, config, FAMILIES[architecture])
        values = weight.scale if isinstance(weight, PackedArray) else weight
        if not np.isfinite(np.asarray(values).astype(np.float32)).all():
            raise ValueError(
                f"{leaf} ({tensor_name}): got NaN or infinity, expected finite values; export another checkpoint"
            )
        rows = np.argsort(order) if isinstance(order, np.ndarray) else order
        kind = _type_of(leaf, weight, embedding if leaf in TABLES else type)
        content = _ternary if isinstance(weight, PackedArray) else _floats
        tensors.append(NewTensor(tensor_name, kind, shape, content(kind, weight, rows)))
    matrices = Counter(
        tensor.type.name for tensor in tensors if tensor.name.startswith("blk.") and len(tensor.shape) == 2
    )
    entries = {"general.architecture": Value("string", architecture), "general.name": Value("string", name)}
    entries |= metadata_of(config, architecture)
    if (usual := matrices.most_common(1)[0][0]) in _FILE_TYPES:
        entries["general.file_type"] = Value("u32", _FILE_TYPES[usual])
    entries |= {**(metadata or {}), "general.quantization_version": Value("u32", 2)}
    gguf_writer.write(path, entries, tensors, overwrite=overwrite)


def _check_precision(layer: str, precision: Precision) -> None:
    """Raises ValueError unless a reader of the file computes what the layer computes."""
    if not precision.quantizes_weights:
        return
    if not (precision.packed_format or "").startswith("ternary"):
        raise ValueError(
            f"{layer}: the precision has weight={precision.weight!r}, expected a ternary quantizer"
        )
    own = {
        "compute_dtype",
        "weight",
        "weight_ste",
        "weight_options",
        "latent_clip",
        "scale",
        "scale_init",
        "granularity",
        "warmup",
    }
    usual = RECIPES["bitnet_b158"]
    assert isinstance(usual, Precision)
    for field in dataclasses.fields(precision):
        if field.name not in own and (got := getattr(precision, field.name)) != getattr(usual, field.name):
            raise ValueError(
                f"{layer}: the precision has {field.name}={got!r}, expected {getattr(usual, field.name)!r}, "
                "which is what programs compute with ternary GGUF types"
            )


def _type_of(leaf: str, weight: Any, wanted: str | None) -> TensorType:
    if isinstance(weight, PackedArray):
        return named_type(wanted if wanted is not None and named_type(wanted).name in TERNARY else "i2_s")
    if weight.ndim == 1:
        return named_type("F32")
    if wanted is None or (named_type(wanted).name in TERNARY and leaf not in TABLES):
        return _exact_type(weight)
    return named_type(wanted)


def _exact_type(weight: Any) -> TensorType:
    values = np.asarray(weight).astype(np.float32)
    for kind in map(named_type, ("F16", "BF16")):
        if kind.name == "F16" and np.abs(values).max() > gguf_types.FLOAT16_MAX:
            continue
        if np.array_equal(gguf_types.decode(kind, gguf_types.encode(kind, values), values.shape), values):
            return kind
    return named_type("F32")


def _ternary(kind: TensorType, weight: PackedArray, rows: Any) -> Any:
    def content() -> np.ndarray:
        scale = np.asarray(weight.scale)
        scale = scale[rows] if len(scale) > 1 else scale
        return encode_ternary(kind.name, Ternary(np.asarray(unpack(weight))[rows], scale))

    return content


def _floats(kind: TensorType, weight: Any, rows: Any) -> Any:
    return lambda: gguf_types.encode(kind, np.asarray(weight).astype(np.float32)[rows])
