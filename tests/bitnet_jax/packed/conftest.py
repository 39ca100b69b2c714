"""The packed model of folders.py: in memory, on disk, and as a copy that a test may damage."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitnet_jax.models import Transformer
from bitnet_jax.packed import packing
from bitnet_jax.packed.storage import save_packed
from tests.bitnet_jax.packed.folders import CONFIG, TOKENIZER


@pytest.fixture(scope="module")
def variables() -> dict[str, Any]:
    abstract = jax.eval_shape(Transformer(CONFIG).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    generator = np.random.default_rng(0)

    def values(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        # Learned scales, which have a dimension of 1 or none, are positive.
        signs = generator.choice([-1, 1], leaf.shape) if min(leaf.shape, default=1) > 1 else 1
        return jnp.asarray(generator.uniform(0.1, 1, leaf.shape) * signs, leaf.dtype)

    return packing.pack(jax.tree.map(values, abstract["params"]), CONFIG)


@pytest.fixture(scope="module")
def saved(variables: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("storage") / "model"
    save_packed(folder, variables, CONFIG, TOKENIZER)
    return folder


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    """A folder that a test may damage."""
    return Path(shutil.copytree(saved, tmp_path / "copy"))
