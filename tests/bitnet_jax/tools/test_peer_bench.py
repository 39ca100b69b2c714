"""Timing against llama.cpp: the file of the same shape, and a llama-bench that is a script here."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bitnet_jax.interop import gguf_file, gguf_types
from bitnet_jax.models import PRESETS, ModelConfig
from bitnet_jax.tools import peer_bench
from bitnet_jax.tools.random_gguf import TYPE_OF, nearest_config, write_random_gguf
from bitnet_jax.tools.random_model import write_random

SHAPE = dataclasses.replace(PRESETS["2b4t"], vocab_size=512, hidden_size=256, ffn_size=512, num_layers=2, head_dim=64,
                            num_heads=4, num_kv_heads=2, max_length=64, head="int4")  # fmt: skip


def script(folder: Path, body: str) -> str:
    """An executable that stands for llama-bench."""
    path = folder / "llama-bench"
    path.write_text(f"#!{sys.executable}\nimport json, sys\n{body}\n")
    path.chmod(0o755)
    return str(path)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("peer") / "model"
    write_random(folder, SHAPE, progress=False)
    return folder


@pytest.mark.parametrize("config", [SHAPE, PRESETS["125m"]], ids=["sub norms", "pre norms"])
def test_the_nearest_model_has_the_same_matrices(config: ModelConfig) -> None:
    ours, theirs = config.linear_shapes(), nearest_config(config).linear_shapes()
    assert {path: shape for path, shape in ours.items() if "/" in path} == {
        path: shape for path, shape in theirs.items() if "/" in path
    }


@pytest.mark.parametrize("kind", sorted(set(TYPE_OF.values())))
def test_the_file_has_the_types_asked_for_and_finite_weights(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "model.gguf"
    write_random_gguf(path, SHAPE, matrices=kind, head="Q8_0")
    file = gguf_file.read(path)
    assert file.metadata["general.architecture"].value == "bitnet"
    assert file.tensors["blk.1.ffn_down.weight"].type.name == kind
    assert file.tensors["token_embd.weight"].type.name == "Q8_0"
    assert file.tensors["blk.1.ffn_down.weight"].shape == (256, 512)
    matrix = file.tensors["blk.0.attn_q.weight"]
    assert np.isfinite(gguf_types.decode(matrix.type, matrix.data, matrix.shape)).all()


def test_both_are_timed_in_turn_by_a_users_llama_bench(model: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    peer = script(
        tmp_path,
        f"open({str(log)!r}, 'a').write(json.dumps(sys.argv[1:]) + chr(10))\n"
        "rows = {'n_prompt': 8, 'n_gen': 0, 'avg_ts': 100.0}, {'n_prompt': 8, 'n_gen': 4, 'avg_ts': 60.0}\n"
        "print(json.dumps(rows))",
    )
    figures = peer_bench.compare(model, peer, prompt=8, new_tokens=5, rounds=2)
    calls = [json.loads(line) for line in log.read_text().splitlines()]
    assert len(calls) == 3  # one of them is not counted
    assert calls[0][calls[0].index("-pg") + 1] == "8,4"
    assert figures["peer_prefill_tokens_per_second"]["median"] == 100.0
    # 12 tokens at 60 a second take 0.2 s, the prompt 0.08 s of them.
    np.testing.assert_allclose(figures["peer_decode_tokens_per_second"]["median"], 4 / (12 / 60 - 8 / 100))
    ours = figures["ours_decode_tokens_per_second"]["median"]
    np.testing.assert_allclose(
        figures["decode_ratio"], ours / figures["peer_decode_tokens_per_second"]["median"]
    )
    assert figures["peer_types"] == "TQ2_0, head Q4_0"
    assert "2 rounds" in peer_bench.table(figures)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("sys.exit('no such model')", "failed with exit code 1: no such model"),
        ("print('hello')", "output without the tests of 8 prompt and 4 new tokens"),
        ("print(json.dumps([{'n_prompt': 1}]))", "output without the tests"),
    ],
)
def test_what_a_llama_bench_gets_wrong_is_told(model: Path, tmp_path: Path, body: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        peer_bench.compare(model, script(tmp_path, body), prompt=8, new_tokens=5, rounds=1)


def test_a_peer_that_is_not_there_is_told(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected llama.cpp or the path of a llama-bench"):
        peer_bench.compare(model, str(tmp_path / "absent"), prompt=8, new_tokens=5, rounds=1)


def test_layers_of_several_formats_are_refused(tmp_path: Path) -> None:
    rules: Any = (("*/q_proj", "bitnet"), ("*", "bitnet_b158"))
    write_random(tmp_path / "mixed", dataclasses.replace(SHAPE, precision=rules), progress=False)
    with pytest.raises(ValueError, match="got layers of 2 formats"):
        peer_bench.compare(tmp_path / "mixed", "llama.cpp", prompt=8, new_tokens=5)
