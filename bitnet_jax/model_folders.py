"""The folders that hold a model, read by one function; and the way from a run to a packed model.

run            what training writes: config.json, checkpoints/, ...         latent weights
packed         what `bitnet-jax pack` writes: model.safetensors, ...         packed weights
hugging face   config.json with model_type, model.safetensors or shards      packed where it is stored packed
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
from bitnet_jax.data.tokenizers import Tokenizer, from_json
from bitnet_jax.inference.generation import greedy
from bitnet_jax.interop import huggingface
from bitnet_jax.models import Architecture, ModelConfig, config_fields, text_config
from bitnet_jax.packed import packing, storage
from bitnet_jax.packed.proof import Proof, prove
from bitnet_jax.quantization.precision import Precision
from bitnet_jax.quantization.recipes import RECIPES

PROMPTS, PROMPT_LENGTH = 16, 8  # of random tokens, from which the proof generates
IMAGES = 64  # of random pixels, on which the proof compares logits

Config = TypeVar("Config", bound=Architecture, covariant=True)


class LoadedModel(NamedTuple, Generic[Config]):
    kind: str  # "run", "packed" or "hugging face"
    config: Config
    variables: dict[str, Any]  # for config.module().apply
    tokenizer: Tokenizer | None  # a run on text always has one
    classes: Classes | None = None  # of a classifier


def load_model(
    folder: str | Path, *, step: int | None = None, verify: bool | None = None
) -> LoadedModel[Architecture]:
    """The model of a folder, whichever kind it is.

    Args:
      step: of the checkpoint, for a run; None: the newest.
      verify: of a packed model, see `storage.load_packed`.

    Raises:
      FileNotFoundError: no such folder, or nothing in it that is known.
      ValueError, RuntimeError: of the readers; damaged or unsupported files, in one line.
    """
    folder = Path(folder)
    kind = folder_kind(folder)
    if step is not None and kind != "run":
        raise ValueError(
            f"got step {step} for {folder}, expected no step: only the folder of a run has several"
        )
    if kind == "run":
        from bitnet_jax.training.load import read_run  # optax and orbax, which a packed model does without

        _, config, latent, tokenizer, classes = read_run(folder, step)
        return LoadedModel(kind, config, latent, tokenizer, classes)
    if kind == "packed":
        packed = storage.load_packed(folder, verify=verify)
        return LoadedModel(
            kind, packed.config, packing.for_this_platform(packed.variables), packed.tokenizer, packed.classes
        )
    config, variables = huggingface.load(folder)
    text = folder / "tokenizer.json"
    read = from_json(text.read_text(encoding="utf-8")) if text.exists() else None
    return LoadedModel(kind, config, packing.for_this_platform(variables), read)


def load_text_model(folder: str | Path, *, step: int | None = None) -> LoadedModel[ModelConfig]:
    """`load_model` of a Transformer on text. Raises ValueError besides: it is a model of images."""
    model = load_model(folder, step=step)
    return LoadedModel(model.kind, text_config(model.config), model.variables, model.tokenizer, model.classes)


def folder_kind(folder: Path) -> str:
    """ "run", "packed" or "hugging face". Raises FileNotFoundError: no such folder, or none of these."""
    if not folder.is_dir():
        raise FileNotFoundError(
            f"got {folder}, expected the folder of a run or of a model; there is no such folder"
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
    # Reversed: where two names mean the same Precision, the first one in RECIPES is told.
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
    """The leaf at the end of nested dicts, or None."""
    for key in keys:
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    return tree


def _is_hugging_face(config: Path) -> bool:
    """Does this config.json name a model_type? Damage is left for the reader of the folder to report."""
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
    """Packs a run's checkpoint, proves the packed model equal to the latent one, and only then writes it.

    What was written is read back and its checksums compared. A classifier keeps its labels and what its inputs go
    through (classes.json), a model with batch norm its statistics.

    Args:
      head: "float", "int8" or "int4" instead of the run's own: the packed model is then equal to the latent one
        with its head in these integers, and not to the one that was trained.
      ternary_format: "ternary2" or "ternary5" instead of the run's own: the same codes in other bytes.
      tokens: at least so many greedy tokens are compared, of PROMPTS prompts or more; none for a classifier, whose
        logits are compared.
      overwrite: replace a packed model that is already there.

    Raises:
      packing.PackingError: the packed model is not the latent one, or a weight cannot be packed; nothing is
        written.
      StorageError: the folder exists (without overwrite), or cannot be written to; looked at before the work.
      ValueError, RuntimeError: of the reader and the writer.
    """
    from bitnet_jax.training.load import read_run

    run, folder = Path(run), Path(folder)
    if (kind := folder_kind(run)) != "run":
        raise ValueError(f"got {run}, the folder of a {kind} model, expected that of a training run")
    storage.check_target(folder, overwrite)
    if tokens < 0:
        raise ValueError(f"got tokens={tokens}, expected 0 or more greedy tokens to compare")
    _, config, latent, tokenizer, classes = read_run(run, step)
    if head is not None and head != getattr(config, "head", "float"):
        text_config(config)
    asked: dict[str, Any] = {"head": head, "ternary_format": ternary_format}
    fields = config_fields(config)
    config = dataclasses.replace(  # type: ignore[type-var]  # every architecture is a dataclass
        config, **{name: value for name, value in asked.items() if value is not None and name in fields}
    )
    variables = latent | packing.pack(latent["params"], config)
    inputs, new_tokens = _proof_inputs(config, tokens)
    proof = prove(config, latent, variables, inputs, greedy=greedy, new_tokens=new_tokens)
    storage.save_packed(folder, variables, config, tokenizer, classes, overwrite=overwrite)
    storage.load_packed(folder, verify=True)
    return proof, packing.sizes(variables)


def _proof_inputs(config: Architecture, tokens: int) -> tuple[Array, int]:
    """What the proof puts to both models, the same every time, and how many tokens each prompt is continued by."""
    key = jax.random.key(0)
    if size := getattr(config, "image_size", 0):
        return jax.random.normal(key, (IMAGES, size, size, getattr(config, "channels", 1))), 0
    config = text_config(config)
    length = min(PROMPT_LENGTH, max(1, config.max_length // 2))
    room = config.max_length - length
    new_tokens = 0 if config.num_classes or not config.causal else min(-(-tokens // PROMPTS), room)
    prompts = max(PROMPTS, -(-tokens // max(new_tokens, 1))) if new_tokens else PROMPTS
    return jax.random.randint(key, (prompts, length), 0, config.vocab_size, "int32"), new_tokens
