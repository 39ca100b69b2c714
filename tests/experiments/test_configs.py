"""Every config file builds a run, in each of its variants."""

from __future__ import annotations

import pytest

from bitnet_jax.training.config import RunConfig
from bitnet_jax.training.config_file import load_config_file, named_configs

CONFIGS = named_configs()
VARIANTS = {"quickstart": ("base", "short")}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_variant_is_a_valid_run(name: str) -> None:
    for variant in VARIANTS.get(name, ("base", "small")):
        fields = load_config_file(f"{name}:{variant}")
        if name in ("sentence_vectors", "adapter"):
            fields.init = "folder"  # which gives the shape
        config = RunConfig.from_dict(fields)
        if config.task == "images":
            config.image_model_config()
        elif config.init is None:
            config.model_config(vocab_size=config.model["vocab_size"])
    with pytest.raises(ValueError, match="expected"):
        load_config_file(f"{name}:no_such_variant")
