"""Language models in GGUF files -> (ModelConfig, variables).

The type in which a matrix is stored decides how it is computed: ternary types (i2_s, TQ1_0, TQ2_0) become packed
weights with int8 activations (the recipe bitnet_b158), with exactly the stored codes and scales; all others are decoded
to float32, exactly, and stay float. TQ types have a scale per block of 256 weights: if those of a matrix or of each of
its rows are equal, it has one scale, or one per row.

Optional tensors `<matrix>.scale`, as llama.cpp writes for the architecture bitnet, multiply the scale.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from bitnet_jax.interop import gguf_file, gguf_types
from bitnet_jax.interop.gguf_config import Family, read_config
from bitnet_jax.interop.gguf_file import GgufFile, Tensor
from bitnet_jax.interop.gguf_ternary import Ternary, decode_ternary
from bitnet_jax.interop.gguf_types import TERNARY
from bitnet_jax.models import ModelConfig
from bitnet_jax.names import unmatched
from bitnet_jax.packed.tensor_file import StorageError
from bitnet_kernels import pack

_MODULES = {
    "attention/q_proj": "attn_q",
    "attention/k_proj": "attn_k",
    "attention/v_proj": "attn_v",
    "attention/o_proj": "attn_output",
    "mlp/gate_proj": "ffn_gate",
    "mlp/up_proj": "ffn_up",
    "mlp/down_proj": "ffn_down",
}
TABLES = ("embed/embedding", "lm_head/weight")
RECIPE_OF = {"tensor": "bitnet_b158", "channel": "bitnet_b158_channel", "group": "bitnet_b158_group256"}


def read(
    path: str | Path, *, i2s_layout: str = "128x32", dtype: str = "float32"
) -> tuple[ModelConfig, dict[str, Any]]:
    """Reads a model; see `model` for the arguments. Raises StorageError."""
    return model(gguf_file.read(path), i2s_layout=i2s_layout, dtype=dtype)


def model(
    file: GgufFile, *, i2s_layout: str = "128x32", dtype: str = "float32"
) -> tuple[ModelConfig, dict[str, Any]]:
    """The model of an open file.

    Args:
      i2s_layout: order of the codes in i2_s tensors, a key of gguf_ternary.I2S_LAYOUTS; no file says which it has.
      dtype: compute dtype, "float32" or "bfloat16"; parameters are float32, except that the embedding and head of a
        packed model stay in bfloat16 if they are stored in it.

    Returns:
      the config and `{"params": ...}` or `{"params": ..., "packed": ...}` for `Transformer(config).apply`.

    Raises:
      StorageError: damaged tensors, or an unsupported model; the message names the file and the key or tensor.
    """
    try:
        return _model(file, i2s_layout, dtype)
    except ValueError as error:
        raise StorageError(f"{file.path}: {error}") from error


def _model(file: GgufFile, i2s_layout: str, dtype: str) -> tuple[ModelConfig, dict[str, Any]]:
    config, family = read_config(file, dtype)
    names = tensor_names(config)
    _check_tensors(file.tensors, names, config)
    params: dict[str, Any] = {}
    ternary: dict[str, Any] = {}
    recipes = {}
    for path, (name, shape) in names.items():
        tensor, layer = file.tensors[name], path.removesuffix("/weight")
        order = row_order(path, config, family)
        scale_name = name.removesuffix(".weight") + ".scale"
        try:
            factor = (
                _floats(file.tensors[scale_name], i2s_layout) if scale_name in file.tensors else np.float32(1)
            )
            if tensor.type.name not in TERNARY or path in TABLES or len(shape) == 1:
                params[path] = jnp.asarray(_floats(tensor, i2s_layout)[order] * factor)
                continue
            matrix, kind = _one_scale(decode_ternary(tensor.type.name, tensor.data, shape, i2s_layout))
            codes, scale = matrix.codes[order], matrix.scale * factor
            scale = scale[order] if len(scale) > 1 else scale
            if not np.isfinite(scale).all():
                raise ValueError("a scale is NaN or infinity; the file is damaged")
            recipes[layer] = RECIPE_OF[kind]
            ternary[path] = pack(jnp.asarray(codes), jnp.asarray(scale), format="ternary2")
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    config = dataclasses.replace(config, precision=_rules(config, recipes))
    if ternary and all(file.tensors[names[p][0]].type.name == "BF16" for p in TABLES if p in names):
        config = dataclasses.replace(config, embedding_dtype="bfloat16")
        params |= {path: params[path].astype("bfloat16") for path in TABLES if path in params}
    variables = {"params": unflatten_dict(params, sep="/")}
    return config, variables | ({"packed": unflatten_dict(ternary, sep="/")} if ternary else {})


def tensor_names(config: ModelConfig) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Parameter path -> (GGUF tensor name, shape), in the order of the published files."""
    D, F, A = config.hidden_size, config.ffn_size, config.num_heads * config.head_size
    names: dict[str, tuple[str, tuple[int, ...]]] = {
        "embed/embedding": ("token_embd.weight", (config.vocab_size, D))
    }
    shapes = config.linear_shapes()
    for i in range(config.num_layers):
        for part, sub_norm, width, norm in (
            ("attention", "attn_sub_norm", A, "attn"),
            ("mlp", "ffn_sub_norm", F, "ffn"),
        ):
            names[f"layers_{i}/{part}_norm/scale"] = (f"blk.{i}.{norm}_norm.weight", (D,))
            for module, theirs in _MODULES.items():
                if module.startswith(f"{part}/"):
                    path = f"layers_{i}/{module}"
                    names[f"{path}/weight"] = (f"blk.{i}.{theirs}.weight", shapes[path])
                    if module.rpartition("/")[2] in config.biased:
                        names[f"{path}/bias"] = (f"blk.{i}.{theirs}.bias", shapes[path][:1])
            if config.qk_norm and part == "attention":
                for head in ("q", "k"):
                    names[f"layers_{i}/attention/{head}_norm/scale"] = (
                        f"blk.{i}.attn_{head}_norm.weight",
                        (config.head_size,),
                    )
            if config.norm_placement == "sub":
                names[f"layers_{i}/{part}/sub_norm/scale"] = (f"blk.{i}.{sub_norm}.weight", (width,))
    names["final_norm/scale"] = ("output_norm.weight", (D,))
    if not config.tie_embeddings:
        names["lm_head/weight"] = ("output.weight", shapes["lm_head"])
    return names


def row_order(path: str, config: ModelConfig, family: Family) -> np.ndarray | slice:
    """Index of the rows of a file's tensor that gives those of the parameter at `path`; `np.argsort` inverts it."""
    heads = {"q_proj": config.num_heads, "k_proj": config.kv_heads}.get(
        path.split("/")[-2] if "/" in path else ""
    )
    if heads is None or not family.paired_rows:
        return slice(None)
    rows = np.arange(heads * config.head_size)
    return rows.reshape(heads, config.head_size // 2, 2).swapaxes(1, 2).reshape(-1)


def _check_tensors(
    tensors: Mapping[str, Tensor], names: Mapping[str, tuple[str, tuple[int, ...]]], config: ModelConfig
) -> None:
    wanted = dict(names.values())
    optional = {
        name.removesuffix(".weight") + ".scale": (1,) for name, shape in wanted.items() if len(shape) == 2
    }
    found = set(tensors)
    if config.tie_embeddings and "output.weight" in found:
        head, table = tensors["output.weight"], tensors["token_embd.weight"]
        if head[:2] != table[:2] or not np.array_equal(head.data, table.data):
            raise ValueError(
                "output.weight differs from token_embd.weight, which this architecture uses as its head"
            )
        found.remove("output.weight")
    if "rope_freqs.weight" in found:
        if not (_floats(tensors["rope_freqs.weight"], "128x32") == 1).all():
            raise ValueError("rope_freqs.weight is not 1; scaled rotary positions are not supported")
        found.remove("rope_freqs.weight")
    for name in sorted(found - wanted.keys()):
        if name.endswith((".bias", "_q_norm.weight", "_k_norm.weight")):
            raise ValueError(
                f"{name}: biases, and norms of q and k, are not supported in this architecture or place"
            )
    if differ := unmatched(wanted.keys(), found - optional.keys()):
        raise ValueError(f"the tensors do not match the metadata: {differ}; such models are not supported")
    for name, shape in (wanted | {name: shape for name, shape in optional.items() if name in found}).items():
        if tensors[name].shape != shape:
            raise ValueError(
                f"{name} has the shape {list(tensors[name].shape)}, the metadata say {list(shape)}"
            )


def _floats(tensor: Tensor, i2s_layout: str) -> np.ndarray:
    values = gguf_types.decode(tensor.type, tensor.data, tensor.shape, i2s_layout)
    if not np.isfinite(values).all():
        raise ValueError("got NaN or infinity, expected finite weights; the file is damaged")
    return values


def _one_scale(matrix: Ternary) -> tuple[Ternary, str]:
    """A matrix with one scale, or one per row, where its blocks agree; and its granularity in RECIPE_OF.

    Blocks without a nonzero code agree with any: writers store the scale 0 for them.
    """
    (codes, scale), (n, groups) = matrix, matrix.scale.shape
    used = codes.reshape(n if groups > 1 or n == len(codes) else 1, groups, -1).any(axis=-1)
    values = scale[used]
    if not values.size or (values == values[0]).all():
        return Ternary(codes, (values[:1] if values.size else scale[:1, 0]).reshape(1, 1)), "tensor"
    first = scale[np.arange(n), used.argmax(axis=1)][:, None]
    if (scale == first)[used].all():
        return Ternary(codes, first), "channel"
    return matrix, "group"


def _rules(config: ModelConfig, recipes: Mapping[str, str]) -> str | tuple[tuple[str, str], ...]:
    """Rules that give each layer its recipe, and layers without one the compute dtype."""
    layers = {path: recipes.get(path, config.dtype) for path in config.linear_shapes() if path != "lm_head"}
    usual = max(sorted(set(layers.values())), key=list(layers.values()).count)
    others = tuple((path, recipe) for path, recipe in layers.items() if recipe != usual)
    return (*others, ("*", usual)) if others else usual
