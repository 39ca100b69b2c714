"""Converting a model between formats, and what that changed."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from bitnet_jax.interop.differences import Differences, differences
from bitnet_jax.interop.huggingface_config_export import NOT_STORED, RESOLVED
from bitnet_jax.model_folders import LoadedModel, load_model, save_model, text_model
from bitnet_jax.models import config_fields
from bitnet_jax.tools.pack_model import with_recipe

# Fields of a config that only training uses, or that are compared with the weights.
_NOT_OUTPUT = NOT_STORED - {"dtype", "trained_length"}


@dataclasses.dataclass(frozen=True)
class Conversion:
    source_format: str
    target_format: str
    weights: Differences
    settings: dict[
        str, tuple[Any, Any]
    ]  # that the target does not keep: name -> (value, value in the target)
    nbytes: int  # of the target


def convert(
    source: str | Path,
    target: str | Path,
    to: str = "packed",
    *,
    recipe: str | None = None,
    step: int | None = None,
    i2s_layout: str | None = None,
    embedding_type: str | None = None,
    overwrite: bool = False,
) -> Conversion:
    """Writes a model in another format, reads it back, and compares.

    Args:
      source, step, i2s_layout: see `load_model`.
      target, to, embedding_type, overwrite: see `save_model`.
      recipe: rounds a float model by this recipe first, without training; the comparison is with the float model.

    Raises:
      FileNotFoundError, ValueError, RuntimeError: as `load_model`, `with_recipe` and `save_model`.
    """
    original = load_model(source, step=step, i2s_layout=i2s_layout)
    model = original if recipe is None else with_recipe(text_model(original), recipe)
    save_model(target, model, to, embedding_type=embedding_type, overwrite=overwrite)
    written = load_model(target)
    before, after = _settings(model), _settings(written)
    return Conversion(
        original.kind,
        written.kind,
        differences(original.variables, original.config, written.variables, written.config),
        {name: (value, after.get(name)) for name, value in before.items() if after.get(name) != value},
        _nbytes(Path(target)),
    )


def _nbytes(target: Path) -> int:
    files = [file for file in target.rglob("*") if file.is_file()] if target.is_dir() else [target]
    return sum(file.stat().st_size for file in files)


def _settings(model: LoadedModel[Any]) -> dict[str, Any]:
    """What a model states beside its weights, by name, as far as its outputs or what is done with them depend on it."""
    config, conversation = model.config, model.conversation
    stated: dict[str, Any] = {
        name: value for name, value in config_fields(config).items() if name not in _NOT_OUTPUT
    }
    stated |= {name: getattr(config, RESOLVED[name]) for name in stated if name in RESOLVED}
    stated["compute_dtype"] = sorted({p.compute_dtype for p in config.precisions().values()})
    stated["tokenizer"] = None if model.tokenizer is None else model.tokenizer.kind
    stated["classes"] = None if model.classes is None else model.classes.to_json()
    return stated | {
        "begin": list(conversation.begin),
        "begins_prompts": conversation.begins_prompts or not conversation.begin,
        "end": sorted(conversation.end),
        "template": conversation.template,
        "template_tokens": conversation.template_tokens,
    }
