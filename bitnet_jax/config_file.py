"""A run's settings from a Python file, with overrides from the command line.

    config = load_config_file("byte_lm:small", ["--config.training.steps=20"])

The file's `get_config(variant="...")` returns an `ml_collections.ConfigDict`. This is ml_collections' own
flag parser without absl's global flags and with one-line errors: an override names a field that exists and
keeps its type. The configs that have a name are the files of the installed package `bitnet_experiments.configs`.
"""

from __future__ import annotations

import difflib
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags


def named_configs() -> dict[str, Path]:
    """Name -> file of every installed config.

    The package is found, not imported: its files are data here.

    Raises:
      FileNotFoundError: the package is not installed.
    """
    spec = importlib.util.find_spec("bitnet_experiments")
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(
            "got no package bitnet_experiments, which holds the configs that have a name; "
            "install bitnet_jax again, or pass a FILE.py"
        )
    (package,) = spec.submodule_search_locations
    files = (Path(package) / "configs").glob("[!_]*.py")
    return {file.stem: file for file in sorted(files)}


def named_config(name: str) -> Path:
    """The file of an installed config.

    Raises:
      FileNotFoundError: there is none of that name; the error lists the nearest.
    """
    configs = named_configs()
    if name not in configs:
        nearest = difflib.get_close_matches(name, configs) or configs
        raise FileNotFoundError(
            f"got config {name!r}, expected FILE.py[:VARIANT] or a name such as {', '.join(nearest)}; "
            "`bitnet-jax init --list` shows them all"
        )
    return configs[name]


def _located(spec: str) -> str:
    """`path/to/file.py[:variant]` of a file that exists."""
    file, variant = Path(spec), ""
    if ".py:" in spec:
        path, _, variant = spec.partition(".py:")
        file = Path(f"{path}.py")
    if file.is_file():
        return spec
    if file.suffix != ".py" and file.name == spec:
        name, colon, variant = spec.partition(":")
        return f"{named_config(name)}{colon}{variant}"
    nearest = difflib.get_close_matches(file.stem, named_configs())
    by_name = f"; installed configs go by name, without .py: {', '.join(nearest)}" if nearest else ""
    raise FileNotFoundError(
        f"got config {spec!r}, expected FILE.py or FILE.py:variant; there is no file {file}{by_name}"
    )


def load_config_file(spec: str, overrides: Sequence[str] = ()) -> ConfigDict:
    """The ConfigDict that a file returns, overrides applied.

    Args:
      spec: a file, `path/to/file.py` or `path/to/file.py:variant`, or an installed config, `name` or `name:variant`.
      overrides: each `--config.section.field=value`.
    Raises:
      FileNotFoundError: no such file, or no config of that name.
      ValueError: no ConfigDict comes out of it, it does not know the variant, or an override names an unknown
        field or does not read as the field's type.
    """
    arguments = ["config", f"--config={_located(spec)}", *overrides]
    sys.modules.pop(
        "config_config", None
    )  # ml_collections would run the file inside the module of the last one
    parser = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=parser, sys_argv=arguments)
    try:
        unknown = parser(arguments)[1:]
        config = parser.config
    except (flags.Error, AttributeError) as error:
        # What the file itself raised comes wrapped in a traceback; its last line says it.
        reason = str(error).strip().splitlines()[-1]
        given = " ".join((spec, *overrides))
        raise ValueError(
            f"got {given}, expected a file with get_config() and overrides of its fields: {reason}"
        ) from error
    if unknown:
        raise ValueError(
            f"got {' '.join(unknown)}, expected overrides of the form --config.section.field=value"
        )
    if not isinstance(config, ConfigDict):
        raise ValueError(
            f"got {type(config).__name__} from {spec}, expected get_config to return a ConfigDict"
        )
    return config
