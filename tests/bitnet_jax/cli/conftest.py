"""A run on a small generated text, for the commands that read a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from bitnet_jax.cli import main as cli

CONFIG = """
from ml_collections import ConfigDict

def get_config(variant="float"):
    recipes = {"float": "float32", "ternary": "bitnet_b158"}
    if variant not in recipes:
        raise ValueError(f"got variant {variant!r}, expected one of {sorted(recipes)}")
    config = ConfigDict(dict(seed=0))
    config.model = ConfigDict(dict(
        hidden_size=16, ffn_size=32, num_layers=1, num_heads=2, max_length=32, precision=recipes[variant],
    ))
    config.data = ConfigDict(dict(source="SOURCE", split="tail", valid_fraction=0.2, length=16, batch_size=2))
    config.training = ConfigDict(dict(steps=3, eval_every=3, checkpoint_every=2, log_every=1))
    config.evaluation = ConfigDict(dict(batches=1, batch_size=2))
    return config
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """text.txt, config.py, `run` trained from them and `packed` packed from it, all with the CLI."""
    place = tmp_path_factory.mktemp("cli")
    (place / "text.txt").write_text("A tiny text about quantized numbers. " * 20)
    (place / "config.py").write_text(CONFIG.replace("SOURCE", str(place / "text.txt")))
    train = ["train", "--config", f"{place}/config.py:ternary", "--workdir", f"{place}/run", "--quiet"]
    overrides = ["--config.training.steps=2", "--config.model.ffn_size=48"]
    assert cli.main([*train, *overrides, "--json", f"{place}/train.json"]) == 0
    pack = ["pack", f"{place}/run", f"{place}/packed", "--tokens", "40", "--json", f"{place}/pack.json"]
    assert cli.main(pack) == 0
    return place
