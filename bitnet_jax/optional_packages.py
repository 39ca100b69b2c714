"""Optional packages, and the error message when one is not installed.

The message names the package instead of an extra of bitnet_jax, which is on no package index, so that the command
works however bitnet_jax was installed. In a clone, `pip install ".[extra]"` does the same.
"""

from __future__ import annotations

# Name on the package index -> its purpose. Each is in an extra of pyproject.toml.
PURPOSES = {
    "datasets": "reads sources hf:NAME",
    "gguf": "decodes tensors of quantized GGUF files",
    "grain": "shuffles without an array of the order",
    "jinja2": "renders chat templates",
    "llama-cpp-python": "runs GGUF files in llama.cpp",
    "llguidance": "keeps answers to a JSON schema",
    "lm-eval": "is lm-evaluation-harness",
    "markdown": "writes report pages",
    "matplotlib": "draws figures",
    "nvidia-ml-py": "reads the energy counters of NVIDIA GPUs",
    "pillow": "reads image files such as .png",
    "prometheus-client": "writes the metrics of a server",
    "pyarrow": "reads Parquet files",
    "rouge-score": "scores summaries",
    "starlette": "routes the requests of a server",
    "submitit": "submits jobs to a cluster",
    "tensorboardX": "writes TensorBoard files",
    "tokenizers": "reads and trains tokenizers",
    "uvicorn": "serves HTTP",
}


def missing_package(name: str) -> str:
    """The error message for a package of PURPOSES that cannot be imported."""
    return f"package {name}, which {PURPOSES[name]}, is not installed; pip install {name}"
