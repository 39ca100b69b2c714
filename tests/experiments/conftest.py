"""A study folder on a small generated text, with models that train in a second."""

from __future__ import annotations

from pathlib import Path

import pytest

from bitnet_experiments.study import Study, read_study

CONFIG = """
from ml_collections import ConfigDict

def get_config(variant="base"):
    model = dict(vocab_size=256, hidden_size=16, num_layers=1, num_heads=2, ffn_size=16, max_length=8,
                 precision="float32")
    return ConfigDict(dict(
        seed=0,
        model=model,
        data=dict(source={text!r}, tokenizer="byte", split="tail", valid_fraction=0.2,
                  length=8, batch_size=2),
        optimizer=dict(learning_rate=1e-2),
        training=dict(steps=4, log_every=2, eval_every=2, checkpoint_every=2),
        evaluation=dict(batches=1, batch_size=2),
    ))
"""

STUDY = """
QUESTION = "Does a toy learn?"
SOURCE = "nobody"
PAPER_EFFECT = "none"
SOURCE_TASK, TASK = "translation", "language modelling"
CLAIMS = ()
CONFIG = {config!r}
METRIC = "valid_loss"
BASELINE = "float32"
EFFECT = "ternary"
ARMS = {{
    "float32": {{"model.precision": "float32"}},
    "broken": {{"model.precision": "no_such_recipe"}},
    "ternary": {{"model.precision": [["*o_proj", "float32"], ["*", "bitnet_b158"]]}},
}}
SEEDS = (0, 1)
SMALL = {{"training.steps": 2}}
SMALL_ARMS = ("float32",)
SMALL_SEEDS = (7,)
"""


@pytest.fixture
def study(tmp_path: Path) -> Study:
    """Three arms, one of which fails to train, with two seeds each."""
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 20)
    (tmp_path / "config.py").write_text(CONFIG.format(text=str(tmp_path / "text.txt")))
    folder = tmp_path / "studies" / "toy"
    folder.mkdir(parents=True)
    (folder / "study.py").write_text(STUDY.format(config=str(tmp_path / "config.py")))
    return read_study(folder)
