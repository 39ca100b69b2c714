"""A float language model in few bits without training, as a packed folder that is proved equal to its latent model."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Int

from bitnet_jax.conversion.blocks import (
    Method,
    Report,
    Settings,
    advance,
    convert_block,
    linear_shapes,
)
from bitnet_jax.conversion.calibration import Stream, embedded, windows
from bitnet_jax.conversion.gptq import DAMPING
from bitnet_jax.conversion.progress_folder import FinishedBlocks
from bitnet_jax.data.streams import stream_blocks
from bitnet_jax.data.text import Source
from bitnet_jax.evaluation.language import token_nats
from bitnet_jax.inference.limits import check_tokens
from bitnet_jax.model_folders import LoadedModel, load_text_model, quantizes_layers
from bitnet_jax.models import ModelConfig
from bitnet_jax.nn.norms import projection_norm
from bitnet_jax.packed import packing, storage
from bitnet_jax.packed.proof import Proof, logits
from bitnet_jax.progress import progress_bar
from bitnet_jax.quantization.scales import Granularity
from bitnet_jax.tools.pack_model import prove_and_save

__all__ = ["DAMPING", "Converted", "default_granularity", "few_bits"]

LENGTH, WINDOWS = 512, 32  # tokens in a window of calibration text, and how many are read
GROUPS = (128, 64, 32)  # inputs per scale, the first that divides the inputs of every layer
PROOF_TOKENS = 32
PARTS = ".parts"  # after the name of the target: the folder of an unfinished conversion


class Converted(NamedTuple):
    settings: Settings
    layers: dict[str, Report]  # of the layers that this call converted
    resumed: int  # blocks that an earlier call had finished
    calibration_tokens: int
    proof: Proof
    sizes: packing.Sizes


def few_bits(
    source: str | Path,
    target: str | Path,
    grid: str = "ternary",
    *,
    calibration: str | None = None,
    method: Method | None = None,
    granularity: Granularity | None = None,
    activation: str = "int16",
    rotate: bool = False,
    length: int = LENGTH,
    count: int = WINDOWS,
    embedding: str | None = None,
    step: int | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> Converted:
    """Converts block by block. An interrupted conversion continues if it is started again with the same arguments.

    Finished blocks are kept in `<target>.parts` until the target is written. The float model is in memory as a whole,
    and of what is computed only one block, and the activations of the calibration text before it.

    Args:
      source, step: a float model of any format, see `load_model`.
      grid, method, granularity, activation, rotate: see `Settings`. By default the method is gptq with calibration text
        and fit without, and the granularity that of `default_granularity`.
      calibration: a text source (data/text.py); without one nothing but the weights is looked at.
      length, count: of the windows that are read of it.
      embedding: of the table and the tied head, as in `pack_model`.

    Raises:
      ValueError, RuntimeError: the model is not a float language model, its tokenizer does not fit the calibration
        text, the text is shorter than a window, or a layer cannot be converted; only finished blocks are written.
      StorageError: as `pack_model`.
    """
    target = Path(target)
    storage.check_target(target, overwrite)
    model = float_model(source, step)
    settings = Settings(
        grid=grid,
        method=method or ("fit" if calibration is None else "gptq"),
        granularity=granularity or default_granularity(model.config),
        activation=activation,
        rotate=rotate,
    )
    if settings.calibrated != (calibration is not None):
        got = "without" if calibration is None else "with"
        raise ValueError(
            f"got the method {settings.method} {got} calibration text; fit has none, the others need one"
        )
    config = converted_config(model.config, settings, embedding)
    packing.check_packable(config)
    tokens = None
    if settings.calibrated:
        tokens = calibration_windows(model, str(calibration), length, count)
    params = dict(model.variables["params"])
    model = model._replace(config=config, variables={})
    subject = subject_of(params, config, dataclasses.asdict(settings), tokens)
    parts = target.with_name(target.name + PARTS)
    finished = FinishedBlocks(parts, subject)
    reports, resumed = convert_blocks(config, params, settings, tokens, finished, progress)
    proof, sizes = prove_and_save(
        target, model._replace(variables={"params": params}), PROOF_TOKENS, overwrite
    )
    shutil.rmtree(parts)
    return Converted(settings, reports, resumed, 0 if tokens is None else tokens.size, proof, sizes)


def convert_blocks(
    config: ModelConfig,
    params: dict[str, Any],
    settings: Settings,
    tokens: Int[np.ndarray, "B T"] | None,
    finished: FinishedBlocks,
    progress: bool,
) -> tuple[dict[str, Report], int]:
    """Replaces the float weights of each block in `params` by latent ones that quantize to its codes and scales.

    Args:
      config: of the converted model.
      tokens: the calibration text, for settings that need it.

    Returns: what became of the layers that this call converted, and the number of blocks that were finished before.
    """
    stream = None if tokens is None else Stream(config, embedded(config, params, tokens))
    reports: dict[str, Report] = {}
    resumed = 0
    with progress_bar(config.num_layers, unit="block", description="converting", show=progress) as bar:
        for layer in range(config.num_layers):
            name = f"layers_{layer}"
            block = finished.read(layer, linear_shapes(params[name]))
            if block is None:
                block, its = convert_block(config, params[name], layer, settings, stream)
                finished.write(layer, block)
                reports |= {f"{name}/{path}": report for path, report in its.items()}
                worst = max(its, key=lambda path: its[path].error)
                bar.set_postfix({"error": f"{its[worst].error:.3f} ({worst})"})
            else:
                resumed += 1
            if stream is not None:
                advance(stream, params[name], layer, block)
            params[name] = _latent(params[name], block)  # frees the float weights of the block
            bar.update()
    return reports, resumed


def converted_config(config: ModelConfig, settings: Settings, embedding: str | None) -> ModelConfig:
    return dataclasses.replace(
        config, precision=settings.rules, embedding_dtype=embedding or config.embedding_dtype
    )


def subject_of(
    params: Mapping[str, Any],
    config: ModelConfig,
    settings: Mapping[str, Any],
    tokens: Int[np.ndarray, "B T"] | None,
) -> dict[str, Any]:
    """Everything that converted blocks depend on, see `FinishedBlocks`."""
    return {
        "settings": settings,
        "embedding": config.embedding_dtype,
        "weights": digest(flatten_dict(dict(params), sep="/")),
        "calibration": None if tokens is None else digest({"tokens": tokens}),
    }


def default_granularity(config: ModelConfig) -> Granularity:
    """The largest group size of GROUPS that divides the inputs of every linear layer of a block, else "channel"."""
    inputs = {k for path, (_, k) in config.linear_shapes().items() if path.startswith("layers_")}
    return next((size for size in GROUPS if all(k % size == 0 for k in inputs)), "channel")


def float_model(source: str | Path, step: int | None) -> LoadedModel[ModelConfig]:
    """A model that can be converted. Raises ValueError: it is quantized, or no language model of ours."""
    model = load_text_model(source, step=step)
    config = model.config
    if quantizes_layers(config) or model.variables.get("packed"):
        raise ValueError(f"got {source}, a quantized {model.kind} model, expected a float model")
    if config.num_classes or not config.causal:
        raise ValueError(f"got {source}, a classifier or a bidirectional model, expected a language model")
    if projection_norm(config) is not None:
        raise ValueError(
            f"got {source} with a norm inside its linear layers, expected norms before blocks or outputs only"
        )
    return model


def calibration_windows(
    model: LoadedModel[ModelConfig], source: str, length: int, count: int
) -> Int[np.ndarray, "B T"]:
    """The first `count` windows of a text source.

    Raises:
      ValueError: the model has no tokenizer, its tokenizer does not fit the model, or the text has no whole window.
    """
    if model.tokenizer is None:
        raise ValueError("got a model without a tokenizer, expected one to read the calibration text; add it")
    length = min(length, model.config.known_length)
    blocks = stream_blocks(Source(source), model.tokenizer, measured=False)
    found = windows((block.tokens for block in blocks), length, count)
    check_tokens(model.config, model.tokenizer, found.reshape(-1), "calibration text")
    _check_fits(model, found[0])
    return found


def _check_fits(model: LoadedModel[ModelConfig], tokens: Int[np.ndarray, "T"]) -> None:
    """Raises ValueError if the float model predicts a window worse than a uniform guess does, by a nat a token."""
    predicted = logits(model.config.module(), model.variables, jnp.asarray(tokens[None, :-1]))
    nats = float(jnp.mean(token_nats(predicted, jnp.asarray(tokens[None, 1:]))))
    uniform = math.log(model.config.vocab_size)
    if not nats < uniform + 1:
        raise ValueError(
            f"got {nats:.1f} nats a token from the float model on the calibration text, expected less than the "
            f"{uniform:.1f} of a uniform guess; do tokenizer and weights belong together?"
        )


def digest(arrays: Mapping[str, Any]) -> str:
    sha = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        sha.update(f"{name} {array.dtype} {array.shape}".encode())
        sha.update(array.view(np.uint8).reshape(-1).data if array.size else b"")
    return sha.hexdigest()


def _latent(params: Mapping[str, Any], block: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of a block with weights that quantize to these codes and scales, which are learned ones."""
    flat = flatten_dict(dict(params), sep="/")
    for path, rounded in block.items():
        flat[f"{path}/weight"] = jnp.asarray(rounded.dequantized())
        flat[f"{path}/weight_scale"] = jnp.asarray(rounded.scale)
    return unflatten_dict(flat, sep="/")
