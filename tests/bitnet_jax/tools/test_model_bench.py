"""The model benchmark measures what it documents, writes the documented fields, and cleans up after itself."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bitnet_jax.cli import main as cli
from bitnet_jax.inference.generation import stream_tokens
from bitnet_jax.models import PRESETS, ModelConfig
from bitnet_jax.packed import packing
from bitnet_jax.packed.storage import load_packed
from bitnet_jax.quantization.recipes import RECIPES
from bitnet_jax.tools import model_bench
from bitnet_jax.tools import step_kernels as step_kernels_module
from bitnet_jax.tools.random_model import write_random
from bitnet_jax.tools.step_kernels import step_kernels
from bitnet_kernels import cpu

FIELDS = {  # the fields of the contract, then those that this repository adds
    "prefill_tokens_per_second", "decode_tokens_per_second", "bytes_per_token", "read_ceiling_gbytes_per_second",
    "ceiling_fraction", "model_bytes", "peak_rss_bytes", "load_seconds", "head_format", "kv_format",
    "implementation", "isa",
    "read_ceiling_loop", "threads", "compile_seconds", "dot_peak_gmacs_per_second", "prefill_peak_fraction",
    "rss_anon_bytes",
    "kernel_fraction", "kernel_seconds_per_token", "prefill_seconds", "decode_seconds_per_token", "prompt",
    "new_tokens", "repeats", "config", "provenance",
    "first_token_seconds_cold", "first_token_seconds_warm", "second_chunk_seconds_cold", "second_chunk_seconds_warm",
    "first_token_prompt", "resident_bytes", "huge_pages",
    "decode_tokens_per_second_by_kv_format", "one_thread", "batch8_tokens_per_second", "batch8_speedup",
}  # fmt: skip
MIXED = ModelConfig(
    vocab_size=40, hidden_size=64, num_layers=2, num_heads=2, ffn_size=96, max_length=32,
    embedding_dtype="bfloat16", tie_embeddings=False,
    precision=(
        ("*/q_proj", "bitnet"), ("layers_0/*/k_proj", "float32"), ("*/o_proj", "bitnet_weight_only"),
        ("*", "bitnet_b158"),
    ),
)  # fmt: skip


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench") / "mixed"
    write_random(folder, MIXED, progress=False)
    return folder


STARTS = {
    f"{name}_seconds_{cache}": 1.5 for name in ("first_token", "second_chunk") for cache in ("cold", "warm")
} | {"resident_bytes": 10**9, "first_token_prompt": 16}


@pytest.fixture
def no_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """No processes are started, which takes ten seconds; see test_first_token.py."""
    monkeypatch.setattr(model_bench, "start_figures", lambda *args, **options: STARTS)


@pytest.fixture(scope="module")
def figures(mixed: Path) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_bench, "start_figures", lambda *args, **options: STARTS)
        return model_bench.bench_model(mixed, prompt=6, new_tokens=5, repeats=3, kv_format="bfloat16")


def test_all_fields_are_present_and_consistent(figures: dict[str, Any]) -> None:
    assert set(figures) == FIELDS
    step, prefill = (figures[name]["median"] for name in ("decode_seconds_per_token", "prefill_seconds"))
    assert 0 < step < 1
    np.testing.assert_allclose(figures["decode_tokens_per_second"], 1 / step)
    np.testing.assert_allclose(figures["prefill_tokens_per_second"], 6 / prefill)
    assert list(figures["decode_tokens_per_second_by_kv_format"]) == ["bfloat16", "int8"]
    speed_of_batch = figures["batch8_tokens_per_second"]
    np.testing.assert_allclose(figures["batch8_speedup"], speed_of_batch * step)
    assert min(figures["one_thread"].values()) > 0
    kernels = figures["kernel_seconds_per_token"]["median"]
    np.testing.assert_allclose(figures["kernel_fraction"], kernels / step)
    assert figures["compile_seconds"] > prefill  # compilation is always slower than this model
    assert (figures["head_format"], figures["kv_format"]) == ("bfloat16", "bfloat16")
    if cpu.unavailable() is None:
        assert (figures["implementation"], figures["isa"]) == ("cpu", cpu.isa())
        speed = figures["bytes_per_token"] / step
        ceiling = 1e9 * figures["read_ceiling_gbytes_per_second"]
        np.testing.assert_allclose(figures["ceiling_fraction"], speed / ceiling)
    if sys.platform == "linux":
        assert 0 < figures["rss_anon_bytes"] < figures["peak_rss_bytes"]
    assert ModelConfig.from_dict(json.loads(json.dumps(figures["config"]))) == MIXED


def test_bytes_per_token_count_weights_one_embedding_row_and_the_cache(
    figures: dict[str, Any],
) -> None:
    sizes = packing.sizes(packing.abstract(MIXED))
    cache = 2 * 2 * (6 + 5 // 2) * 64 * 2  # layers, keys and values, positions, channels, bytes
    assert figures["model_bytes"] == sizes.total
    assert (
        figures["bytes_per_token"] == sizes.packed + sizes.other + (40 * 64 + 64) * 2 + cache
    )  # the head and one row


@pytest.mark.extended
def test_the_timed_model_uses_the_reported_cache_format(
    mixed: Path, monkeypatch: pytest.MonkeyPatch, no_starts: None
) -> None:
    formats = []

    def recorded(*arguments: Any, **options: Any) -> Iterator[np.ndarray]:
        formats.append(options["kv_format"])
        return stream_tokens(*arguments, **options)

    monkeypatch.setattr(model_bench, "stream_tokens", recorded)
    model_bench.bench_model(mixed, prompt=2, new_tokens=2, repeats=1, kv_format="int8")
    assert (
        formats.count("int8") == 6
    )  # twice alone, twice on one thread, twice as a batch: to compile, and timed
    assert set(formats) == {"int8", "bfloat16"}


def test_the_kernels_of_a_step_match_the_model(mixed: Path) -> None:
    config, variables, *_ = load_packed(mixed)
    assert step_kernels_module._calls(config)[:4] == [
        [f"layers_0/attention/{name}" for name in ("q_proj", "k_proj", "v_proj")],
        ["layers_0/attention/o_proj"],
        ["layers_0/mlp/gate_proj", "layers_0/mlp/up_proj"],
        ["layers_0/mlp/down_proj"],
    ]
    assert step_kernels_module._calls(config)[-1] == ["lm_head"]
    tied = dataclasses.replace(MIXED, tie_embeddings=True)
    assert step_kernels_module._calls(tied)[-1] == ["embed"]
    for model, kv_format in ((config, "int8"), (tied, None)):
        assert step_kernels(model, variables, 2, 5, kv_format)(0) == 0


def test_the_table_lists_what_could_not_be_measured(figures: dict[str, Any]) -> None:
    absent = dict.fromkeys(("read_ceiling_gbytes_per_second", "ceiling_fraction", "rss_anon_bytes"))
    for line in model_bench.table(figures | absent).splitlines():
        if line.strip().startswith(("of the read ceiling", "not of the model file")):
            assert line.endswith("not measured")
    assert f"{figures['decode_tokens_per_second']:.2f} tokens/s" in model_bench.table(figures)


@pytest.mark.extended
def test_the_command_on_one_thread_leaves_no_files_behind(tmp_path: Path, repository: Path) -> None:
    """In a separate process, as it pins itself to one processor. An error removes the temporary folder too."""
    temporary, path = tmp_path / "temporary", tmp_path / "bench.json"
    temporary.mkdir()
    roots = os.pathsep.join([str(repository), str(repository / "kernels")])
    environment = os.environ | {"PYTHONPATH": roots, "TMPDIR": str(temporary), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "bitnet_jax.cli", "bench", "--preset", "tiny", "--recipe", "bitnet"]
    sizes = ["--prompt", "4", "--generate", "3", "--repeats", "1", "--quick"]
    threads = ["--threads", "1"] if hasattr(os, "sched_setaffinity") else []
    done = subprocess.run(
        [*command, *sizes, *threads, "--json", str(path)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert not list(temporary.iterdir())
    figures = json.loads(path.read_text())
    assert set(figures) == FIELDS
    assert figures["config"]["precision"] == "bitnet"
    assert not threads or figures["threads"] == figures["provenance"]["threads"] == 1
    assert "tokens/s, 4 tokens" in done.stdout


def test_a_kept_or_named_folder_is_reused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(model_bench.tempfile, "tempdir", str(tmp_path))
    with model_bench.model_folder(PRESETS["tiny"], None, keep=True) as folder:
        pass
    assert load_packed(folder)[0] == PRESETS["tiny"]
    assert f"the model is kept in {folder}" in capsys.readouterr().err

    named = tmp_path / "named"
    config = model_bench.preset_config("tiny", "bitnet")
    with model_bench.model_folder(config, named) as folder:
        written = (named / "model.safetensors").stat().st_mtime_ns
    for asked in (config, None):
        with model_bench.model_folder(asked, named) as folder:
            assert (folder, (named / "model.safetensors").stat().st_mtime_ns) == (named, written)
    with (
        pytest.raises(ValueError, match="of another preset, recipe or head"),
        model_bench.model_folder(PRESETS["tiny"], named),
    ):
        pass


@pytest.mark.parametrize("preset", ["tiny", "125m"])  # with a tied and an untied head
def test_the_head_may_have_a_separate_recipe(preset: str) -> None:
    config = model_bench.preset_config(preset, "bitnet", "bitnet_b158")
    precisions = config.precisions()
    assert precisions["lm_head"] == RECIPES["bitnet_b158"]
    assert {value for path, value in precisions.items() if path != "lm_head"} == {RECIPES["bitnet"]}
    assert (
        model_bench.preset_config(preset, "bitnet_a48", "bitnet").precisions()["lm_head"] == RECIPES["bitnet"]
    )


@pytest.mark.parametrize("head", ["int8", "int4"])
def test_an_integer_head_is_a_matrix_separate_from_the_embedding(head: str, tmp_path: Path) -> None:
    config = model_bench.preset_config("tiny", None, head)
    assert (config.head, config.tie_embeddings) == (head, True)
    write_random(tmp_path / "model", config, progress=False)
    _, variables, *_ = load_packed(tmp_path / "model")
    assert model_bench.head_format(config, variables) == head
    V = config.vocab_size
    assert step_kernels_module._calls(config)[-1] == ["lm_head"]
    # One row of the embedding, which is looked up and no longer multiplied.
    table = variables["params"]["embed"]["embedding"]
    sizes, cache = (
        packing.sizes(variables),
        2 * config.num_layers * 5 * config.kv_heads * config.head_size * 4,
    )
    read = sizes.total - table.nbytes + table.nbytes // V + cache
    assert model_bench._bytes_per_token(config, variables, 5, None) == read


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "3b"], "--preset: got '3b', expected one of 125m, "),
        (["--preset", "tiny", "--recipe", "1bit"], "recipe: got '1bit'"),
        ([], "got no --preset, expected one of"),
        (["--model", "nowhere"], "got no --preset, expected one of"),
        (["--preset", "tiny", "--generate", "1"], "got 1 new tokens .* expected at least 2"),
        (["--preset", "tiny", "--prompt", "300"], "max_length=256"),
        (["--preset", "tiny", "--threads", "0"], "got --threads 0, expected 1 to"),
        (["--preset", "tiny", "--compare", "llama.cpp", "--huge-pages"], "got --compare with --huge-pages"),
    ],
)
def test_invalid_arguments_are_one_line_errors(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(model_bench.tempfile, "tempdir", str(tmp_path))
    assert cli.main(["bench", *arguments]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not list(tmp_path.iterdir())
