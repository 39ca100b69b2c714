"""A run's settings from a Python file, with overrides from the command line.

    config = load_config_file("experiments/configs/byte_lm.py:small", ["--config.training.steps=20"])

The file's `get_config(variant="...")` returns an `ml_collections.ConfigDict`. This is ml_collections' own
flag parser, the one `experiments.run` uses, without absl's global flags and with one-line errors: an
override names a field that exists and keeps its type.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags


def load_config_file(spec: str, overrides: Sequence[str] = ()) -> ConfigDict:
    """The ConfigDict that a file returns, overrides applied.

    Args:
      spec: `path/to/file.py` or `path/to/file.py:variant`.
      overrides: each `--config.section.field=value`.
    Raises:
      FileNotFoundError: no such file.
      ValueError: no ConfigDict comes out of it, it does not know the variant, or an override names an unknown
        field or does not read as the field's type.
    """
    file = Path(spec.partition(".py:")[0] + ".py") if ".py:" in spec else Path(spec)
    if not file.is_file():
        raise FileNotFoundError(
            f"got config {spec!r}, expected FILE.py or FILE.py:variant; there is no file {file}"
        )
    arguments = ["config", f"--config={spec}", *overrides]
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
