"""Every config file builds a run, in each of its variants."""

from __future__ import annotations

from pathlib import Path

import pytest

from bitnet_jax.config_file import load_config_file
from bitnet_jax.training.config import RunConfig

CONFIGS = Path(__file__).parents[2] / "experiments" / "configs"
VARIANTS = {"quickstart": ("base", "short")}


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.py")), ids=lambda path: path.stem)
def test_every_variant_is_a_valid_run(path: Path) -> None:
    for variant in VARIANTS.get(path.stem, ("base", "small")):
        config = RunConfig.from_dict(load_config_file(f"{path}:{variant}"))
        if config.task == "images":
            config.image_model_config()
        else:
            config.model_config(vocab_size=config.model["vocab_size"])
    with pytest.raises(ValueError, match="expected"):
        load_config_file(f"{path}:no_such_variant")
