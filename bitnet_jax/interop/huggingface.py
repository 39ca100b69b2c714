"""BitNet, Llama and related checkpoints in Hugging Face format -> (ModelConfig, variables).

Storage forms (`quantization_config` of config.json):

| linear_class | mode | stored for a projection | its output |
|---|---|---|---|
| (none) | | float W | x W^T |
| autobitlinear | online | latent float W | int8(x) ternary(W)^T, with scale mean abs W |
| autobitlinear | offline | ternary T (packed or floats), `weight_scale` | int8(x) T^T **times** the scale |
| bitlinear | offline | ternary T (packed), `weight_scale` | int8(x) T^T **divided by** the scale |

Absent keys of quantization_config have the library's defaults: bitlinear, offline. Both libraries store tensors as
[outputs, inputs] and pair the two halves of a head in rotary embeddings, so nothing is permuted.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax.traverse_util import unflatten_dict
from jaxtyping import Array, Float, Int8, Shaped, UInt8

from bitnet_jax.interop.huggingface_config import Form, module_name, read_config
from bitnet_jax.interop.safetensors_folder import float32, open_tensors, read_json
from bitnet_jax.models import ModelConfig
from bitnet_jax.names import unmatched
from bitnet_jax.packed.latent import unpack_model
from bitnet_jax.packed.packing import TABLES
from bitnet_jax.quantization.registry import WEIGHT_QUANTIZERS
from bitnet_jax.quantization.scales import SMALLEST_SCALE
from bitnet_kernels import PackedArray, pack

CODES_PER_BYTE = 4
_EMBEDDING = "model.embed_tokens.weight"


def load(
    folder: str | Path, *, packed: bool = True, dtype: str = "float32"
) -> tuple[ModelConfig, dict[str, Any]]:
    """Reads a model folder: `config.json` and `model.safetensors` (or its shards and their index).

    Args:
      folder: of a model with a model_type in huggingface_families.FAMILIES.
      packed: how to load offline (already ternary) projections. True: as PackedArrays in the collection `packed`,
        with exactly the stored codes and scale. False: as latent weights in `params`, for further training; they
        quantize to exactly the stored codes, and to the scale up to float32 rounding. Float weights (plain and online
        checkpoints) become `params` in either case.
      dtype: compute dtype, "float32" or "bfloat16"; parameters are cast (exactly) to float32, except that the
        embedding and head of a packed model stay in bfloat16 if they are stored in it.

    Returns:
      the config and `{"params": ...}` or `{"params": ..., "packed": ...}` for `Transformer(config).apply`.

    Raises:
      FileNotFoundError: config.json or the weights are missing.
      ValueError: damaged files (StorageError), or an unsupported model.
    """
    folder = Path(folder)
    tensors = open_tensors(folder)
    config, form = read_config(read_json(folder / "config.json"), len(tensors), dtype)
    tables = [tensors[name] for name in (_EMBEDDING, "lm_head.weight") if name in tensors]
    if tables and all(table.dtype == ml_dtypes.bfloat16 for table in tables):
        config = dataclasses.replace(config, embedding_dtype="bfloat16")

    names = tensor_names(config)
    quantized = {f"{path}/weight" for path, p in config.precisions().items() if p.quantizes_weights}
    ternary = quantized if form.offline else set()
    scale_names = {names[path][0] + "_scale" for path in ternary}
    _check_names(folder, tensors, {name for name, _ in names.values()} | scale_names, config)

    params, packed_weights = {}, {}
    for path, (name, shape) in names.items():
        key = tuple(path.split("/"))
        weight = f"{path.rpartition('/')[0]}/weight"
        try:
            if path not in ternary:
                value = float32(tensors[name], shape)
                if path.endswith("/bias") and weight in ternary and form.scale_multiplies:
                    # The library multiplies the output by the scale after it has added the bias.
                    value = value * _scale(tensors[f"{names[weight][0]}_scale"], form)
                params[key] = jnp.asarray(value)
                continue
            codes = _codes(tensors[name], shape, form)
            packed_weights[key] = _packed_array(codes, _scale(tensors[f"{name}_scale"], form))
        except ValueError as error:
            raise ValueError(f"{folder}: {name}: {error}") from error
    if not packed_weights:
        return config, {"params": unflatten_dict(params)}
    for path in TABLES:
        key = tuple(path.split("/"))
        if key in params:
            params[key] = params[key].astype(config.embedding_dtype)
    variables = {"params": unflatten_dict(params), "packed": unflatten_dict(packed_weights)}
    return config, variables if packed else unpack_model(config, variables)


def tensor_names(config: ModelConfig) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Parameter path -> (Hugging Face tensor name, shape of the unpacked tensor)."""
    D, F, A = config.hidden_size, config.ffn_size, config.num_heads * config.head_size
    names: dict[str, tuple[str, tuple[int, ...]]] = {
        "embed/embedding": (_EMBEDDING, (config.vocab_size, D)),
        "final_norm/scale": ("model.norm.weight", (D,)),
    }
    for i in range(config.num_layers):
        ours, theirs = f"layers_{i}", f"model.layers.{i}"
        names[f"{ours}/attention_norm/scale"] = (f"{theirs}.input_layernorm.weight", (D,))
        names[f"{ours}/mlp_norm/scale"] = (f"{theirs}.post_attention_layernorm.weight", (D,))
        if config.qk_norm:
            for norm in ("q_norm", "k_norm"):
                names[f"{ours}/attention/{norm}/scale"] = (
                    f"{theirs}.self_attn.{norm}.weight",
                    (config.head_size,),
                )
        if config.norm_placement == "sub":
            names[f"{ours}/attention/sub_norm/scale"] = (f"{theirs}.self_attn.attn_sub_norm.weight", (A,))
            names[f"{ours}/mlp/sub_norm/scale"] = (f"{theirs}.mlp.ffn_sub_norm.weight", (F,))
    for path, (n, k) in config.linear_shapes().items():
        module = module_name(path)
        names[f"{path}/weight"] = (f"{module}.weight", (n, k))
        if path.rpartition("/")[2] in config.biased:
            names[f"{path}/bias"] = (f"{module}.bias", (n,))
        if config.inside_norm and path != "lm_head":
            names[f"{path}/norm/scale"] = (f"{module}.rms_norm.weight", (k,))
    return names


def unpack_weight(packed: UInt8[np.ndarray, "rows k"]) -> Int8[np.ndarray, "n k"]:
    """Bytes of a Hugging Face ternary weight -> codes in {-1, 0, 1}, n = 4 rows.

    Byte [r, c] holds `code + 1` of the outputs r, r + rows, r + 2 rows, r + 3 rows of the input column c, two
    bits each, lowest bits first: each byte combines one row from each quarter of the matrix.

    Raises:
      ValueError: a byte contains the invalid bit pair 3.
    """
    fields = np.concatenate([(packed >> (2 * i)) & 3 for i in range(CODES_PER_BYTE)], axis=0)
    if (fields == 3).any():
        row, column = np.argwhere(fields == 3)[0]
        raise ValueError(
            f"output {row}, input {column} has code 3, expected 0, 1 or 2; the file is damaged or not ternary"
        )
    return fields.astype(np.int8) - np.int8(1)


def pack_weight(weight: Float[Array, "n k"]) -> tuple[UInt8[np.ndarray, "n/4 k"], np.float32]:
    """A latent weight -> (its ternary codes in the layout of `unpack_weight`, mean abs of the weight).

    An autobitlinear checkpoint stores this scale as `weight_scale` (bitlinear: its reciprocal).

    Raises:
      ValueError: the number of outputs is not a multiple of 4.
    """
    n, k = weight.shape
    if n % CODES_PER_BYTE:
        raise ValueError(f"weight has {n} outputs, expected a multiple of 4: four rows share a byte")
    return pack_codes(ternary_codes(weight)), mean_magnitude(weight)


def ternary_codes(weight: Float[Array, "n k"]) -> Shaped[np.ndarray, "n k"]:
    """The codes in {-1, 0, 1} of a latent weight."""
    return np.asarray(WEIGHT_QUANTIZERS["ternary_absmean"](weight.astype(jnp.float32)).codes)


def pack_codes(codes: Shaped[np.ndarray, "n k"]) -> UInt8[np.ndarray, "n/4 k"]:
    """Codes in {-1, 0, 1}, of any dtype -> bytes, the inverse of `unpack_weight`; n is a multiple of 4."""
    n, k = codes.shape
    fields = (codes + 1).astype(np.uint8).reshape(CODES_PER_BYTE, n // CODES_PER_BYTE, k)
    packed: np.ndarray = fields[0] | fields[1] << 2 | fields[2] << 4 | fields[3] << 6
    return packed


def mean_magnitude(weight: Float[Array, "n k"]) -> np.float32:
    """The scale of a latent weight: `max(mean |W|, 1e-5)`, in float32."""
    return np.float32(jnp.maximum(jnp.mean(jnp.abs(weight.astype(jnp.float32))), SMALLEST_SCALE))


def _check_names(folder: Path, tensors: dict[str, np.ndarray], wanted: set[str], config: ModelConfig) -> None:
    # Old Llama checkpoints store the rotary frequencies, which follow from rope_theta.
    found = {name for name in tensors if not name.endswith(".rotary_emb.inv_freq")}
    if config.tie_embeddings and {"lm_head.weight", _EMBEDDING} <= found:
        found.remove("lm_head.weight")
        if not np.array_equal(tensors["lm_head.weight"], tensors[_EMBEDDING]):
            raise ValueError(
                f"{folder}: tie_word_embeddings is true but lm_head.weight differs from the embedding; "
                "set it to false in config.json"
            )
    if differ := unmatched(wanted, found):
        raise ValueError(
            f"{folder}: the tensors do not match config.json: {differ}; check model_type, num_hidden_layers, "
            "tie_word_embeddings and quantization_config"
        )


def _codes(tensor: np.ndarray, shape: tuple[int, ...], form: Form) -> np.ndarray:
    """int8 codes [n, k] from packed bytes [n/4, k] or from floats [n, k], as the library saves a loaded model."""
    n, k = shape
    if tensor.dtype == np.uint8 and tensor.shape == (n / CODES_PER_BYTE, k):
        return unpack_weight(tensor)
    if not form.scale_multiplies or tensor.dtype == np.uint8 or tensor.shape != shape:
        floats = f" or floats [{n}, {k}]" if form.scale_multiplies else ""
        raise ValueError(
            f"got {tensor.dtype}{list(tensor.shape)}, expected uint8 [{n}/4, {k}]{floats}; "
            "check the sizes and the quantization_config of config.json"
        )
    values = float32(tensor, shape)
    if not np.isin(values, (-1.0, 0.0, 1.0)).all():
        raise ValueError(
            "got values other than -1, 0 and 1 in an offline checkpoint; "
            'latent weights need quantization_mode "online" in config.json'
        )
    return values.astype(np.int8)


def _scale(tensor: np.ndarray, form: Form) -> np.float32:
    """The factor that multiplies the integer product."""
    if tensor.size != 1:
        raise ValueError(f"weight_scale has shape {list(tensor.shape)}, expected one value")
    value = float32(tensor, tensor.shape).reshape(())
    # The reciprocal of a smaller number overflows float32; real scales are far larger.
    if not value > 1e-37:
        raise ValueError(f"weight_scale is {value}, expected a positive number")
    return np.float32(value if form.scale_multiplies else 1 / value)


def _packed_array(codes: np.ndarray, scale: np.float32) -> PackedArray:
    return pack(jnp.asarray(codes), jnp.full((1, 1), scale, jnp.float32), format="ternary2")
