"""(ModelConfig, variables) -> a model folder in Hugging Face format; `huggingface.load` is the inverse.

| form | projections | weight_scale |
|---|---|---|
| plain | float W of a float model | |
| online | latent float W of a ternary model, quantized by the library | |
| packed | ternary, four codes per byte | mean abs W: multiplies the output |
| unpacked | ternary values as floats | mean abs W: multiplies the output |
| bitlinear | ternary, four codes per byte | 1 / mean abs W: divides the output |

The first two hold a model that can be trained further, `packed` is the form of the published 2B-4T model, and older
libraries read only `bitlinear`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from flax.traverse_util import flatten_dict

from bitnet_jax.data.conversation import Conversation, of_documents
from bitnet_jax.data.tokenizers import Tokenizer
from bitnet_jax.interop.huggingface import (
    CODES_PER_BYTE,
    mean_magnitude,
    pack_codes,
    pack_weight,
    tensor_names,
    ternary_codes,
)
from bitnet_jax.interop.huggingface_config_export import FORMS, config_json
from bitnet_jax.interop.huggingface_conversation import (
    CONFIG,
    GENERATION,
    TEMPLATE,
    TOKENIZER,
    TOKENIZER_CONFIG,
)
from bitnet_jax.interop.huggingface_conversation_export import files_of
from bitnet_jax.interop.safetensors_folder import read_json
from bitnet_jax.models import ModelConfig
from bitnet_jax.packed import tensor_file
from bitnet_jax.packed.atomic_folder import atomic_folder, check_writable, remove_stale, synced_file
from bitnet_jax.packed.latent import with_float_tables
from bitnet_jax.packed.packing import TABLES
from bitnet_jax.packed.tensor_file import StorageError, Streamed
from bitnet_kernels import PackedArray, unpack

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
SHARD_BYTES = 5_000_000_000  # the library's own limit
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_SHARD = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")


def save(
    folder: str | Path,
    config: ModelConfig,
    variables: Mapping[str, Any],
    *,
    form: str,
    dtype: str | None = None,
    tokenizer: Tokenizer | None = None,
    conversation: Conversation | None = None,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes config.json, the weights, and tokenizer.json if a tokenizer is given.

    The folder is complete or absent (atomic_folder.py). Tensors are made one by one while they are written.

    Args:
      variables: `{"params": ...}` with latent weights, or also `{"packed": ...}`. Packed models have no latent
        weights, so they have no form "online".
      form: a key of the table above.
      dtype: "float32" or "bfloat16", of all floats of the file; None: bfloat16 if it holds every value exactly, else
        float32. Tables that the model rounds to bfloat16 (config.embedding_dtype) are stored in it in either case.
        Ternary codes are made before anything is rounded.
      tokenizer: of the kind that tokenizer.json holds.
      conversation: begin and end tokens and chat template; None: the end token of the tokenizer.
      overwrite: replace an existing folder that has only files of this format.
      shard_bytes: a larger model is split into files of at most this size (or one tensor) and an index.

    Raises:
      ValueError: the form cannot hold the model (the message names the field, layer or parameter), or a value is not
        finite; nothing is written.
      StorageError: the folder exists (without overwrite), has files of other formats (with it), or cannot be written.
    """
    folder = Path(folder)
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}, expected one of {', '.join(DTYPES)}, or None")
    if shard_bytes < 1:
        raise ValueError(f"shard_bytes is {shard_bytes}, expected a positive number")
    conversation = of_documents(tokenizer) if conversation is None else conversation
    texts = files_of(tokenizer, conversation)
    config, variables = with_float_tables(config, variables)
    content = config_json(config, form, dtype or "float32")
    _check_target(folder, overwrite)

    sources = _sources(config, variables, form)
    content["torch_dtype"] = stored = dtype or _smallest_dtype(config, sources)
    ends = list(conversation.end)
    content["eos_token_id"] = ends if len(ends) > 1 else next(iter(ends), None)
    texts[CONFIG] = json.dumps(content, indent=2) + "\n"
    tables = {name for path, (name, _) in tensor_names(config).items() if path in TABLES}
    tensors = {
        name: source.stored_as(config.embedding_dtype if name in tables and stored == "float32" else stored)
        for name, source in sources.items()
    }
    shards = _shards(tensors, shard_bytes)
    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": nbytes},
            "weight_map": {name: file for file, part in shards.items() for name in part},
        }
        texts[_INDEX] = json.dumps(index, indent=2) + "\n"
    with atomic_folder(folder, nbytes, overwrite=overwrite) as temporary:
        for file_name, part in shards.items():
            with synced_file(temporary / file_name) as file:
                tensor_file.write(file, part, {"format": "pt"}, aligned=False)
        for file_name, text in texts.items():
            with synced_file(temporary / file_name) as file:
                file.write(text.encode())


def _check_target(folder: Path, overwrite: bool) -> None:
    """Raises StorageError: the folder cannot be written, exists (without overwrite), or has other files than `save`
    writes (with it): overwriting removes them all."""
    remove_stale(folder)
    if folder.exists() or folder.is_symlink():
        if not overwrite:
            raise StorageError(f"{folder} exists; choose another folder")
        is_folder = folder.is_dir() and not folder.is_symlink()
        names = {entry.name for entry in folder.iterdir()} if is_folder else set()
        written = {CONFIG, _INDEX, GENERATION, TOKENIZER, TOKENIZER_CONFIG, TEMPLATE}
        others = sorted(name for name in names - written if not _SHARD.fullmatch(name))
        if others or "model_type" not in _content(folder / CONFIG):
            raise StorageError(
                f"{folder} is not a folder that this format writes "
                + (f"(it has {others[0]}) " if others else "")
                + "and will not be overwritten; choose another folder"
            )
    check_writable(folder)


def _content(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except (OSError, ValueError):
        return {}


@dataclasses.dataclass(frozen=True)
class _Source:
    """A tensor of the file that is computed when it is needed: floats, or bytes if `packed`."""

    shape: tuple[int, ...]
    make: Callable[[np.dtype], np.ndarray]  # float dtype of the file -> the tensor
    packed: bool = False

    def stored_as(self, dtype: str) -> Streamed:
        kind = DTYPES[dtype]

        def chunks() -> Iterator[np.ndarray]:
            yield self.make(kind)

        return Streamed(self.shape, np.dtype(np.uint8) if self.packed else kind, chunks())


def _sources(config: ModelConfig, variables: Mapping[str, Any], form: str) -> dict[str, _Source]:
    """Every tensor of the file by its name. Raises ValueError for missing, unexpected or non-finite variables."""
    params = flatten_dict(dict(variables["params"]), sep="/")
    packed: dict[str, PackedArray] = flatten_dict(dict(variables.get("packed", {})), sep="/")
    names = tensor_names(config)
    _check_variables(params, packed, names)
    ternary = {f"{path}/weight" for path, p in config.precisions().items() if p.quantizes_weights}
    sources: dict[str, _Source] = {}
    for path, (name, shape) in names.items():
        if path in packed and form == "online":
            raise ValueError(
                f"{path} is packed and has no latent weights, which form 'online' needs; export the training "
                "checkpoint, or choose form packed, unpacked or bitlinear"
            )
        if path in params and not np.isfinite(np.asarray(params[path], np.float32)).all():
            raise ValueError(
                f"{path} contains NaN or infinity, expected finite values; export another checkpoint"
            )
        if path not in ternary or form == "online":
            sources[name] = _Source(shape, _floats(params[path]))
            continue
        weight = packed.get(path, params.get(path))
        n, k = shape
        if form == "unpacked":
            sources[name] = _Source(shape, _unpacked(weight))
        else:
            sources[name] = _Source((n // CODES_PER_BYTE, k), _bytes(weight), packed=True)
        scale = np.float32(weight.scale[0, 0]) if isinstance(weight, PackedArray) else mean_magnitude(weight)
        sources[f"{name}_scale"] = _Source((1,), _scale(path, scale, FORMS[form].scale_multiplies))
    return sources


def _floats(leaf: Any) -> Callable[[np.dtype], np.ndarray]:
    return lambda dtype: np.asarray(leaf).astype(dtype)


def _bytes(weight: Any) -> Callable[[np.dtype], np.ndarray]:
    if isinstance(weight, PackedArray):
        return lambda dtype: pack_codes(np.asarray(unpack(weight)))
    return lambda dtype: pack_weight(weight)[0]


def _unpacked(weight: Any) -> Callable[[np.dtype], np.ndarray]:
    if isinstance(weight, PackedArray):
        return lambda dtype: np.asarray(unpack(weight)).astype(dtype)
    return lambda dtype: ternary_codes(weight).astype(dtype)


def _scale(path: str, scale: np.float32, multiplies: bool) -> Callable[[np.dtype], np.ndarray]:
    if not scale > 1e-37:
        raise ValueError(
            f"{path} has the scale {scale}, expected a positive number whose reciprocal is finite"
        )
    return lambda dtype: np.full(1, scale if multiplies else _reciprocal(scale, dtype), dtype)


def _reciprocal(scale: np.float32, dtype: np.dtype) -> Any:
    """The number whose reciprocal is `scale` exactly, if the dtype has one near 1 / scale, else the nearest one.

    Bfloat16 first: rounding twice can miss the number that the scale was read from.
    """
    nearest = np.float32(1) / scale
    candidates = [nearest.astype(ml_dtypes.bfloat16).astype(np.float32), nearest]
    candidates += [np.nextafter(nearest, np.float32(end)) for end in (0, math.inf)]
    return next((x for x in candidates if np.float32(1) / x == scale), nearest).astype(dtype)


def _smallest_dtype(config: ModelConfig, sources: Mapping[str, _Source]) -> str:
    """bfloat16 if it holds every float of the file exactly, else float32."""
    tables = {name for path, (name, _) in tensor_names(config).items() if path in TABLES}
    for name, source in sources.items():
        if source.packed or (name in tables and config.embedding_dtype == "bfloat16"):
            continue
        values = source.make(DTYPES["float32"])
        if not np.array_equal(values, values.astype(ml_dtypes.bfloat16).astype(np.float32)):
            return "float32"
    return "bfloat16"


def _check_variables(
    params: Mapping[str, Any], packed: Mapping[str, Any], names: Mapping[str, tuple[str, tuple[int, ...]]]
) -> None:
    got = {path: tuple(leaf.shape) for path, leaf in (*params.items(), *packed.items())}
    for path in sorted(got.keys() | names.keys()):
        expected = names[path][1] if path in names else None
        if got.get(path) != expected:
            has = list(got[path]) if path in got else "none"
            wanted = list(expected) if expected is not None else "no such parameter in a Hugging Face model"
            raise ValueError(f"{path}: got {has}, expected {wanted}; do the variables belong to this config?")


def _shards(tensors: Mapping[str, Streamed], limit: int) -> dict[str, dict[str, Streamed]]:
    """File name -> its tensors, in order; files of at most `limit` bytes, or of one larger tensor."""
    parts: list[dict[str, Streamed]] = [{}]
    room = limit
    for name, tensor in tensors.items():
        if tensor.nbytes > room and parts[-1]:
            parts.append({})
            room = limit
        parts[-1][name] = tensor
        room -= tensor.nbytes
    if len(parts) == 1:
        return {_SINGLE: parts[0]}
    return {f"model-{i + 1:05}-of-{len(parts):05}.safetensors": part for i, part in enumerate(parts)}
