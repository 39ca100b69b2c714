"""Loading a model from any kind of folder, and packing a run.

run            written by training: config.json, checkpoints/, ...           latent weights
packed         written by `bitnet-jax pack`: model.safetensors, ...          packed weights
hugging face   config.json with model_type, model.safetensors or shards      packed if stored packed
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import jax
from jaxtyping import Array

from bitnet_jax.data import Classes
from bitnet_jax.data.conversation import Conversation, of_documents
from bitnet_jax.data.tokenizers import Tokenizer, from_json
from bitnet_jax.inference.generation import greedy
from bitnet_jax.interop import huggingface, huggingface_conversation
from bitnet_jax.models import Architecture, ModelConfig, config_fields, text_config
from bitnet_jax.packed import packing, storage
from bitnet_jax.packed.proof import Proof, prove
from bitnet_jax.quantization.precision import Precision
from bitnet_jax.quantization.recipes import RECIPES

PROMPTS, PROMPT_LENGTH = 16, 8  # random prompts from which the proof generates
IMAGES = 64  # random images on which the proof compares logits

Config = TypeVar("Config", bound=Architecture, covariant=True)


class LoadedModel(NamedTuple, Generic[Config]):
    kind: str  # "run", "packed" or "hugging face"
    config: Config
    variables: dict[str, Any]  # for config.module().apply
    tokenizer: Tokenizer | None  # never None for a run on text
    classes: Classes | None = None  # only for classifiers
    conversation: Conversation = Conversation()  # begin and end tokens, chat template


def load_model(
    folder: str | Path, *, step: int | None = None, verify: bool | None = None
) -> LoadedModel[Architecture]:
    """The model of a folder of any kind.

    Args:
      step: for a run, the checkpoint; None: the newest.
      verify: for a packed model, see `storage.load_packed`.

    Raises:
      FileNotFoundError: no such folder, or it contains no model.
      ValueError, RuntimeError: damaged or unsupported files; the message is one line.
    """
    folder = Path(folder)
    kind = folder_kind(folder)
    if step is not None and kind != "run":
        raise ValueError(f"got step {step} for {folder}, expected no step: only a run folder has several")
    if kind == "run":
        from bitnet_jax.training.load import read_run  # imports optax and orbax, not needed for packed models

        _, config, latent, tokenizer, classes = read_run(folder, step)
        return LoadedModel(kind, config, latent, tokenizer, classes, of_documents(tokenizer))
    if kind == "packed":
        packed = storage.load_packed(folder, verify=verify)
        return LoadedModel(kind, *packed._replace(variables=packing.for_this_platform(packed.variables)))
    config, variables = huggingface.load(folder)
    text = folder / "tokenizer.json"
    read = from_json(text.read_text(encoding="utf-8")) if text.exists() else None
    conversation = huggingface_conversation.read(folder, config.vocab_size, read)
    return LoadedModel(kind, config, packing.for_this_platform(variables), read, None, conversation)


def load_text_model(folder: str | Path, *, step: int | None = None) -> LoadedModel[ModelConfig]:
    """`load_model` of a Transformer on text. Also raises ValueError for an image model."""
    model = load_model(folder, step=step)
    return LoadedModel(model.kind, text_config(model.config), *model[2:])


def folder_kind(folder: Path) -> str:
    """ "run", "packed" or "hugging face". Raises FileNotFoundError: no such folder, or another kind."""
    if not folder.is_dir():
        raise FileNotFoundError(
            f"got {folder}, expected the folder of a run or a model; there is no such folder"
        )
    if (folder / "checkpoints").is_dir():
        return "run"
    if _is_hugging_face(folder / "config.json"):
        return "hugging face"
    if (folder / storage.MODEL).exists():
        return "packed"
    raise FileNotFoundError(f"got {folder}, expected checkpoints/ (a run) or {storage.MODEL} (a model) in it")


def matrices(config: Architecture, variables: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Path -> shape (n, k), recipe, stored (format and layout, or dtype) and bytes of every linear layer."""
    # Reversed: if two names have the same Precision, the first one in RECIPES is used.
    names = {value: name for name, value in reversed(RECIPES.items()) if isinstance(value, Precision)}
    rows = {}
    for path, precision in config.precisions().items():
        keys = (*path.split("/"), "weight")
        weight = _leaf(variables.get("packed", {}), keys)
        if weight is None:
            weight = _leaf(variables["params"], packing.latent_path(config, path).split("/"))
            stored = str(weight.dtype)
        else:
            stored = f"{weight.format} {weight.layout}"
        recipe = names.get(precision, f"{precision.weight} x {precision.activation}")
        rows[path] = {"shape": list(weight.shape), "recipe": recipe, "stored": stored, "bytes": weight.nbytes}
    return rows


def _leaf(tree: Any, keys: Sequence[str]) -> Any:
    """The leaf of nested dicts at a key path, or None."""
    for key in keys:
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    return tree


def _is_hugging_face(config: Path) -> bool:
    """Whether this config.json has a model_type. A damaged file is reported later, by the reader of the folder."""
    try:
        content = json.loads(config.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and "model_type" in content


def pack_run(
    run: str | Path,
    folder: str | Path,
    *,
    step: int | None = None,
    tokens: int = 2000,
    head: str | None = None,
    ternary_format: str | None = None,
    overwrite: bool = False,
) -> tuple[Proof, packing.Sizes]:
    """Pack a checkpoint of a run, prove the packed model equal to the latent one, and only then write it.

    The written files are read back and their checksums verified. A classifier keeps its labels and input preprocessing
    (classes.json), a model with batch norm its statistics.

    Args:
      head: "float", "int8" or "int4" in place of the run's setting: the packed model then equals the latent one with
        such a head, not the trained one.
      ternary_format: "ternary2" or "ternary5" in place of the run's setting: the same codes, packed differently.
      tokens: minimum number of greedy tokens to compare, over at least PROMPTS prompts; ignored for classifiers, whose
        logits are compared.
      overwrite: replace an existing packed model.

    Raises:
      packing.PackingError: the packed model differs from the latent one, or a weight cannot be packed; nothing is
        written.
      StorageError: the folder exists (without overwrite) or cannot be written; checked before any work.
      ValueError, RuntimeError: the run cannot be read, or the folder cannot be written.
    """
    from bitnet_jax.training.load import read_run

    run, folder = Path(run), Path(folder)
    if (kind := folder_kind(run)) != "run":
        raise ValueError(f"got {run}, the folder of a {kind} model, expected the folder of a training run")
    storage.check_target(folder, overwrite)
    if tokens < 0:
        raise ValueError(f"got tokens={tokens}, expected 0 or more greedy tokens to compare")
    _, config, latent, tokenizer, classes = read_run(run, step)
    if head is not None and head != getattr(config, "head", "float"):
        text_config(config)
    overrides: dict[str, Any] = {"head": head, "ternary_format": ternary_format}
    fields = config_fields(config)
    config = dataclasses.replace(  # type: ignore[type-var]  # every architecture is a dataclass
        config, **{name: value for name, value in overrides.items() if value is not None and name in fields}
    )
    variables = latent | packing.pack(latent["params"], config)
    inputs, new_tokens = _proof_inputs(config, tokens)
    proof = prove(config, latent, variables, inputs, greedy=greedy, new_tokens=new_tokens)
    conversation = None if tokenizer is None or classes is not None else of_documents(tokenizer)
    storage.save_packed(
        folder, variables, config, tokenizer, classes, conversation=conversation, overwrite=overwrite
    )
    storage.load_packed(folder, verify=True)
    return proof, packing.sizes(variables)


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
