"""Packing a model of any format, with the proof that the packed model equals the latent one."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
from jaxtyping import Array

from bitnet_jax.inference.generation import greedy
from bitnet_jax.model_folders import LoadedModel, check_no_adapter, load_model, quantizes_layers, text_model
from bitnet_jax.models import Architecture, ModelConfig, config_fields, text_config
from bitnet_jax.packed import packing, storage
from bitnet_jax.packed.proof import Proof, prove

PROMPTS, PROMPT_LENGTH = 16, 8  # random prompts from which the proof generates
IMAGES = 64  # random images on which the proof compares logits


def pack_model(
    source: str | Path,
    folder: str | Path,
    *,
    recipe: str | None = None,
    step: int | None = None,
    tokens: int = 2000,
    head: str | None = None,
    embedding: str | None = None,
    ternary_format: str | None = None,
    overwrite: bool = False,
) -> tuple[Proof, packing.Sizes]:
    """Packs a latent model, proves the packed model equal to it, and only then writes it.

    The written files are read back and their checksums verified. A classifier keeps its labels and input preprocessing
    (classes.json), a model with batch norm its statistics.

    Args:
      source: a run, or a model of another format that has latent weights, see `load_model`.
      recipe: rounds a float model by this recipe first, without training; the proof compares the packed model with the
        rounded one.
      step: of a run: the checkpoint; None: the newest.
      head: "float", "int8" or "int4" in place of the model's setting: the packed model then equals the latent one with
        such a head, not the trained one.
      embedding: "float32", "bfloat16", "int8", "int4" or "uint4" in place of the model's `embedding_dtype`, likewise. A
        table of integers is also the head, unless the head is untied.
      ternary_format: "ternary2" or "ternary5" in place of the model's setting: the same codes, packed differently.
      tokens: minimum number of greedy tokens to compare, over at least PROMPTS prompts; ignored for classifiers, whose
        logits are compared.
      overwrite: replace an existing packed model.

    Raises:
      packing.PackingError: the packed model differs from the latent one, or a weight cannot be packed; nothing is
        written.
      StorageError: the folder exists (without overwrite) or cannot be written; checked before any work.
      ValueError, RuntimeError: the source cannot be read, is packed already, or the recipe does not fit it.
    """
    folder = Path(folder)
    storage.check_target(folder, overwrite)
    if tokens < 0:
        raise ValueError(f"got tokens={tokens}, expected 0 or more greedy tokens to compare")
    model: Any = load_model(source, step=step)
    check_no_adapter(model.variables, folder)
    if model.variables.get("packed"):
        raise ValueError(
            f"got {source}, a {model.kind} model whose weights are packed, expected latent weights: a run, or a float "
            "or latent model; `bitnet-jax convert` copies packed weights into another format"
        )
    if recipe is not None:
        model = with_recipe(text_model(model), recipe)
    config = model.config
    overrides = {"head": head, "embedding_dtype": embedding, "ternary_format": ternary_format}
    fields = config_fields(config)
    for name in ("head", "embedding_dtype"):
        if overrides[name] not in (None, fields.get(name, {"head": "float"}.get(name))):
            text_config(config)
    config = dataclasses.replace(
        config, **{name: value for name, value in overrides.items() if value is not None and name in fields}
    )
    return prove_and_save(folder, model._replace(config=config), tokens, overwrite)


def prove_and_save(
    folder: Path, model: LoadedModel[Any], tokens: int, overwrite: bool
) -> tuple[Proof, packing.Sizes]:
    """Packs a latent model and proves it equal, then writes it. Arguments and errors: see `pack_model`."""
    config, latent = model.config, model.variables
    variables = latent | packing.pack(latent["params"], config)
    inputs, new_tokens = _proof_inputs(config, tokens)
    proof = prove(config, latent, variables, inputs, greedy=greedy, new_tokens=new_tokens)
    storage.save_packed(
        folder,
        variables,
        config,
        model.tokenizer,
        model.classes,
        conversation=model.conversation,
        overwrite=overwrite,
    )
    storage.load_packed(folder, verify=True)
    return proof, packing.sizes(variables)


def with_recipe(model: LoadedModel[ModelConfig], recipe: str) -> LoadedModel[ModelConfig]:
    """A float model whose linear layers are rounded by a recipe, without training.

    Raises:
      ValueError: the model is quantized already, an unknown recipe, or one with learned parameters.
    """
    if quantizes_layers(model.config):
        raise ValueError(f"got recipe {recipe!r} for a quantized {model.kind} model, expected a float model")
    config = dataclasses.replace(model.config, precision=recipe)
    for path, precision in config.precisions().items():
        if "learned" in (precision.scale, precision.activation_scale) or precision.activation_shift:
            raise ValueError(
                f"{path}: the recipe {recipe!r} has learned parameters, which rounding alone does not find; train with "
                "it, or choose a recipe with measured scales"
            )
    return model._replace(config=config)


def _proof_inputs(config: Architecture, tokens: int) -> tuple[Array, int]:
    """The deterministic inputs of the proof, and the number of new tokens per prompt."""
    key = jax.random.key(0)
    if size := getattr(config, "image_size", 0):
        return jax.random.normal(key, (IMAGES, size, size, getattr(config, "channels", 1))), 0
    config = text_config(config)
    length = min(PROMPT_LENGTH, max(1, config.max_length // 2))
    room = config.max_length - length
    new_tokens = 0 if config.num_classes or not config.causal else min(-(-tokens // PROMPTS), room)
    prompts = max(PROMPTS, -(-tokens // max(new_tokens, 1))) if new_tokens else PROMPTS
    return jax.random.randint(key, (prompts, length), 0, config.vocab_size, "int32"), new_tokens
