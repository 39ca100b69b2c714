"""A random model is a valid packed model of its config, and is written without holding it in memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitnet_jax.models import ModelConfig, Transformer
from bitnet_jax.packed.storage import load_packed
from bitnet_jax.tools.random_model import write_random

# Sizes that are not multiples of panels or blocks, several kinds of scales, and layers that stay float.
CONFIG = ModelConfig(
    vocab_size=301, hidden_size=72, num_layers=2, num_heads=2, ffn_size=128, max_length=32,
    embedding_dtype="bfloat16", use_bias=True, tie_embeddings=False,
    precision=(
        ("layers_0/mlp/up_proj", "float32"), ("*/q_proj", "paretoq_1.58"), ("*/k_proj", "bit"),
        ("*/down_proj", "bitnet_group64"), ("*/v_proj", "int4"), ("lm_head", "int8"), ("*", "bitnet_b158"),
    ),
)  # fmt: skip


def test_it_is_valid_reproducible_and_has_plausible_outputs(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("same", 0), ("other", 1)):
        write_random(tmp_path / name, CONFIG, seed, progress=False)
    content = {name: (tmp_path / name / "model.safetensors").read_bytes() for name in ("a", "same", "other")}
    assert content["a"] == content["same"] != content["other"]

    config, variables, tokenizer, *_ = load_packed(tmp_path / "a", verify=True)
    assert (config, tokenizer) == (CONFIG, None)
    embedding = np.asarray(variables["params"]["embed"]["embedding"], np.float32)
    np.testing.assert_allclose(embedding.std(), CONFIG.init_std, rtol=0.05)  # of 21672 draws
    assert len(np.unique(embedding, axis=0)) == CONFIG.vocab_size
    tokens = jnp.asarray([[5, 250, 7, 0, 31]])
    logits: Any = jax.jit(Transformer(config).apply)(variables, tokens)
    # The scales preserve the magnitude of the input, here normalized to 1.
    assert 0.5 < np.std(logits.logits) < 2


def test_progress_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_random(tmp_path / "model", CONFIG)
    assert f"random weights to {tmp_path}/model: " in (told := capsys.readouterr().err)
    assert told.count("\n") == 1  # not a terminal: one line, no bar


MEMORY = """
import sys
from pathlib import Path
import dataclasses
import jax
from bitnet_jax.inference.generation import generate
from bitnet_jax.models import PRESETS
from bitnet_jax.tools.random_model import write_random
from bitnet_jax.packed.storage import load_packed

def memory(kind):  # MiB
    status = Path("/proc/self/status").read_text()
    return int(status.partition(f"Rss{kind}:")[2].split()[0]) / 1024

# Few layers, for the compiler takes memory by layer, and wide ones.
shape = dict(num_layers=4, hidden_size=4096, ffn_size=24576, num_heads=32, vocab_size=64, max_length=16)
config = dataclasses.replace(PRESETS["125m"], **shape)
write_random(sys.argv[1], dataclasses.replace(config, num_layers=1), progress=False, overwrite=True)
before = memory("Anon")
write_random(sys.argv[1], config, progress=False, overwrite=True)
written = memory("Anon")
config, variables, *_ = load_packed(sys.argv[1])
loaded = memory("Anon")
generate(config, variables, [[1, 2]], max_new_tokens=4).tokens.block_until_ready()
print(written - before, loaded - written, memory("Anon") - loaded, memory("File"))
"""


@pytest.mark.extended
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_writing_loading_and_generating_make_no_copy_of_the_weights(tmp_path: Path, repository: Path) -> None:
    """Only the file mapping grows with the packed weights, 352 MiB."""
    path = os.pathsep.join([str(repository), str(repository / "kernels")])
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path / "model")],
        env=os.environ | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    writing, loading, generating, mapped = map(float, done.stdout.split())
    packed = (tmp_path / "model" / "model.safetensors").stat().st_size / 2**20
    assert packed > 350
    assert mapped > packed  # the generation did read them
    assert writing < 40
    assert loading < 40
    assert generating < 150  # compiled code and the compiler's memory
