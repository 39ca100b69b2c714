"""Packages that only some features need, and what the error says where one is not installed.

The advice names the package itself, which works however bitnet_jax was installed: it is on no package index, so pip
finds no extras under its name. In a clone, `pip install ".[extra]"` does the same.
"""

from __future__ import annotations

# Name on the package index -> what needs it. Each is in an extra of pyproject.toml.
PURPOSES = {
    "datasets": "reads sources hf:NAME",
    "lm-eval": "is lm-evaluation-harness",
    "markdown": "writes pages of reports",
    "matplotlib": "draws figures",
    "nvidia-ml-py": "reads the meters of NVIDIA GPUs",
    "pillow": "reads image files such as .png",
    "rouge-score": "measures summaries",
    "submitit": "submits jobs to a cluster",
    "tensorboardX": "writes TensorBoard files",
    "tokenizers": "reads and makes tokenizer.json",
}


def missing_package(name: str) -> str:
    """The text of the error for a package of PURPOSES that cannot be imported."""
    return f"got no package {name}, which {PURPOSES[name]}; pip install {name}"
