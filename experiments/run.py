"""One run: train, evaluate, checkpoint; continue where the work directory left off.

    python -m experiments.run --config=experiments/configs/byte_lm.py:small --workdir=runs/first \\
        --config.optimizer.learning_rate=2e-3
"""

from __future__ import annotations

import json

from absl import app, flags
from ml_collections import config_flags

from bitnet_jax.training.loop import fit

_CONFIG = config_flags.DEFINE_config_file("config", None, "Python file with get_config(); FILE.py:variant.")
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of the run; resumed when it holds one.", required=True
)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"got unexpected arguments {argv[1:]}; options look like --config.a.b=value")
    print(json.dumps(fit(_CONFIG.value, _WORKDIR.value), indent=2))


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    app.run(main)
