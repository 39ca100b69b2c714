"""Run settings from a Python file, with overrides from the command line.

    config = load_config_file("byte_lm:small", ["--config.training.steps=20"])

The file's `get_config(variant="...")` returns an `ml_collections.ConfigDict`. A config file is executed as Python:
load only trusted files. Overrides are parsed by ml_collections' flag parser, without absl's global flags: an
override must name a field and keep its type; the file need not list fields that have a default. Every error is one
line. Named configs are the files of the installed package `bitnet_experiments.configs`.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags
from ml_collections.config_dict import placeholder

from bitnet_jax.models import ModelConfig
from bitnet_jax.names import check_name, suggestion
from bitnet_jax.training.config import RunConfig
from bitnet_jax.training.python_file import load_python_file, one_line_errors


def named_configs() -> dict[str, Path]:
    """Name -> file of every installed config.

    The package is located without importing it.

    Raises:
      FileNotFoundError: the package is not installed.
    """
    spec = importlib.util.find_spec("bitnet_experiments")
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(
            "got no package bitnet_experiments, which holds the named configs; "
            "reinstall bitnet_jax, or pass a FILE.py"
        )
    (package,) = spec.submodule_search_locations
    files = (Path(package) / "configs").glob("[!_]*.py")
    return {file.stem: file for file in sorted(files)}


def named_config(name: str) -> Path:
    """The file of an installed config.

    Raises:
      FileNotFoundError: no config of that name; the message names the nearest one.
    """
    configs = named_configs()
    if name not in configs:
        raise FileNotFoundError(
            f"config: got {name!r}, expected FILE.py[:VARIANT] or one of {', '.join(configs)}"
            f"{suggestion(name, configs)}"
        )
    return configs[name]


def _resolve_spec(spec: str) -> tuple[Path, str | None]:
    """The existing file of a spec, and its variant or None."""
    path, colon, variant = spec.partition(".py:")
    file = Path(f"{path}.py" if colon else spec)
    if file.exists() and not file.is_dir():
        return file, variant if colon else None
    if file.suffix != ".py" and file.name == spec:
        name, colon, variant = spec.partition(":")
        return named_config(name), variant if colon else None
    near = suggestion(file.stem, named_configs())
    by_name = f"; installed configs are named without .py{near}" if near else ""
    raise FileNotFoundError(
        f"got config {spec!r}, expected FILE.py or FILE.py:variant; there is no file {file}{by_name}"
    )


def load_config_file(spec: str, overrides: Sequence[str] = ()) -> ConfigDict:
    """The ConfigDict returned by a file, with overrides applied.

    Args:
      spec: a file, `path/to/file.py` or `path/to/file.py:variant`, or an installed config, `name` or `name:variant`.
      overrides: each `--config.section.field=value`.
    Raises:
      FileNotFoundError: no such file, or no config of that name.
      ValueError: the file or its get_config raises (the message gives file and line), get_config does not return
        a ConfigDict, or an override names an unknown field or cannot be parsed as the field's type.
    """
    file, variant = _resolve_spec(spec)
    get_config = getattr(load_python_file(file), "get_config", None)
    if not callable(get_config):
        raise ValueError(f"got {file} without get_config; define get_config(variant=...) in it")
    with one_line_errors(file):
        config = get_config() if variant is None else get_config(variant)
    if not isinstance(config, ConfigDict):
        raise ValueError(
            f"got {type(config).__name__} from {spec}, expected get_config to return a ConfigDict"
        )
    for override in overrides:
        _add_default(config, override)
        _check_path(config, override)
    return _apply_overrides(config, overrides) if overrides else config


def _add_default(config: ConfigDict, override: str) -> None:
    """Adds the field that an override names, with its default, if it exists and only the file lacks it."""
    section, _, name = override.partition("=")[0].removeprefix("--config.").partition(".")
    if (section, name) == ("init", "") and "init" not in config:
        config.init = placeholder(str)
        return
    kinds: dict[str, Any] = {field.name: field.default_factory for field in dataclasses.fields(RunConfig)}
    kind = ModelConfig if section == "model" and "model" in config else kinds.get(section)
    if not (isinstance(kind, type) and dataclasses.is_dataclass(kind)):
        return
    defaults = {field.name: field.default for field in dataclasses.fields(kind)}
    fields = config.get(section, ConfigDict())
    if name not in defaults or not isinstance(fields, ConfigDict) or name in fields:
        return
    hint = typing.get_type_hints(kind)[name]
    (value_type, *others) = (part for part in typing.get_args(hint) or (hint,) if part is not type(None))
    if others or value_type not in (bool, int, float, str) or defaults[name] is dataclasses.MISSING:
        return
    fields[name] = placeholder(value_type)  # gives it a type; the default may be None
    fields[name] = defaults[name]
    config[section] = fields


def _check_path(config: ConfigDict, override: str) -> None:
    """ValueError unless the override has the form --config.section.field and names a field of the config."""
    name = override.partition("=")[0]
    if not name.startswith("--config."):
        raise ValueError(f"got {override}, expected overrides of the form --config.section.field=value")
    path = "config"
    node: Any = config
    for part in name.removeprefix("--config.").split("."):
        field = part.partition("[")[0]  # sizes[0]=... sets one item of a list
        fields = list(node) if isinstance(node, ConfigDict) else []
        check_name(f"{override}: field of {path}", field, fields)
        path, node = f"{path}.{field}", node.get(field)


def _apply_overrides(config: ConfigDict, overrides: Sequence[str]) -> ConfigDict:
    arguments = ["config", *overrides]
    parser = flags.FlagValues()
    try:
        config_flags.DEFINE_config_dict("config", config, flag_values=parser, sys_argv=arguments)
        parser(arguments)
    # ml_collections does not wrap every error of a value that it cannot parse or assign.
    except (flags.Error, AttributeError, LookupError, TypeError, ValueError, SyntaxError) as error:
        reason = str(error).strip().splitlines()[-1]
        raise ValueError(
            f"got {' '.join(overrides)}, expected values of the fields' types: {reason}"
        ) from error
    return parser.config
