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
from typing import Any, NamedTuple

import jax

from bitnet_jax import packing, storage
from bitnet_jax.data.tokenizers import Tokenizer, from_json
from bitnet_jax.inference.generate import greedy
from bitnet_jax.interop import huggingface
from bitnet_jax.nn.config import ModelConfig
from bitnet_jax.precision import RECIPES, Precision

PROMPTS, PROMPT_LENGTH = 16, 8  # of random tokens, from which the proof generates


class LoadedModel(NamedTuple):
    kind: str  # "run", "packed" or "hugging face"
    config: ModelConfig
    variables: dict[str, Any]  # for Transformer(config).apply
    tokenizer: Tokenizer | None  # a run always has one


def load_model(folder: str | Path, *, step: int | None = None, verify: bool | None = None) -> LoadedModel:
    """The model of a folder, whichever kind it is.

    Args:
      step: of the checkpoint, for a run; None: the newest.
      verify: of a packed model, see `storage.load_packed`.

    Raises:
      FileNotFoundError: no such folder, or nothing in it that is known.
      ValueError, RuntimeError: of the readers; damaged or unsupported files, in one line.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"got {folder}, expected the folder of a run or of a model; there is no such folder"
        )
    if (folder / "checkpoints").is_dir():
        from bitnet_jax.training.loop import load_run  # optax and orbax, which a packed model does without

        _, config, params, tokenizer = load_run(folder, step)
        return LoadedModel("run", config, {"params": params}, tokenizer)
    if step is not None:
        raise ValueError(
            f"got step {step} for {folder}, expected no step: only the folder of a run has several"
        )
    if _is_hugging_face(folder / "config.json"):
        config, variables = huggingface.load(folder)
        text = folder / "tokenizer.json"
        read = from_json(text.read_text(encoding="utf-8")) if text.exists() else None
        return LoadedModel("hugging face", config, packing.for_this_platform(variables), read)
    if (folder / storage.MODEL).exists():
        config, variables, read = storage.load_packed(folder, verify=verify)
        return LoadedModel("packed", config, packing.for_this_platform(variables), read)
    raise FileNotFoundError(f"got {folder}, expected checkpoints/ (a run) or {storage.MODEL} (a model) in it")


def matrices(config: ModelConfig, variables: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
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
) -> tuple[packing.Proof, packing.Sizes]:
    """Packs a run's checkpoint, proves the packed model equal to the latent one, and only then writes it.

    What was written is read back and its checksums compared.

    Args:
      head: "float", "int8" or "int4" instead of the run's own: the packed model is then equal to the latent one
        with its head in these integers, and not to the one that was trained.
      ternary_format: "ternary2" or "ternary5" instead of the run's own: the same codes in other bytes.
      tokens: at least so many greedy tokens are compared, of PROMPTS prompts or more; none for a classifier.
      overwrite: replace a packed model that is already there.

    Raises:
      packing.PackingError: the packed model is not the latent one, or a weight cannot be packed; nothing is
        written.
      FileExistsError: the folder exists (without overwrite).
      ValueError, RuntimeError: of the reader and the writer.
    """
    from bitnet_jax.training.loop import load_run

    folder = Path(folder)
    if folder.exists() and not overwrite:  # before the work; save_packed looks again
        raise FileExistsError(
            f"got {folder}, which exists; expected a new folder, or overwriting to be asked for"
        )
    if tokens < 0:
        raise ValueError(f"got tokens={tokens}, expected 0 or more greedy tokens to compare")
    _, config, params, tokenizer = load_run(run, step)
    asked: dict[str, Any] = {"head": head, "ternary_format": ternary_format}
    config = dataclasses.replace(
        config, **{name: value for name, value in asked.items() if value is not None}
    )
    variables = packing.pack(params, config)
    length = min(PROMPT_LENGTH, max(1, config.max_length // 2))
    room = config.max_length - length
    new_tokens = 0 if config.num_classes or not config.causal else min(-(-tokens // PROMPTS), room)
    prompts = max(PROMPTS, -(-tokens // max(new_tokens, 1))) if new_tokens else PROMPTS
    prompt = jax.random.randint(jax.random.key(0), (prompts, length), 0, config.vocab_size, "int32")
    proof = packing.prove(config, {"params": params}, variables, prompt, greedy=greedy, new_tokens=new_tokens)
    storage.save_packed(folder, variables, config, tokenizer, overwrite=overwrite)
    storage.load_packed(folder, verify=True)
    return proof, packing.sizes(variables)
