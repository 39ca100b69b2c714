"""The public names of `import bitnet_jax`, and the cost of importing them."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import bitnet_jax

NAMES = [
    "BitLinear",
    "ModelConfig",
    "PRESETS",
    "Precision",
    "RECIPES",
    "RunConfig",
    "SamplingConfig",
    "Transformer",
    "fit",
    "generate",
    "load_model",
    "pack",
    "prove",
    "resolve",
    "save_packed",
]
TRAINING = ("optax", "orbax", "tensorstore")


def loaded_after(code: str, *names: str) -> set[str]:
    """Which of the modules are loaded after `code` has run in a new process."""
    program = f"{code}\nimport sys\nprint(*(name for name in {names!r} if name in sys.modules))"
    path = [
        str(Path(module.__path__[0]).parent)
        for module in (bitnet_jax, importlib.import_module("bitnet_kernels"))
    ]
    environment = {"PYTHONPATH": ":".join(path), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


def test_the_list_of_public_names() -> None:
    assert dir(bitnet_jax) == NAMES
    for name in NAMES:
        assert getattr(bitnet_jax, name) is not None
    with pytest.raises(AttributeError):
        _ = bitnet_jax.no_such_name  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "package", ["quantization", "nn", "models", "packed", "inference", "interop", "training"]
)
def test_every_package_exports_what_it_lists(package: str) -> None:
    module = importlib.import_module(f"bitnet_jax.{package}")
    assert module.__all__
    for name in module.__all__:
        assert getattr(module, name).__module__ if callable(getattr(module, name)) else True
        submodule = Path(module.__path__[0]) / f"{name}.py"
        assert not submodule.exists(), (
            f"{name} is both a function and a module: which one it is depends on import order"
        )


def test_importing_the_package_imports_nothing_heavy() -> None:
    assert loaded_after("import bitnet_jax", "jax", "flax", "numpy", *TRAINING) == set()


def test_packed_inference_needs_no_training_libraries() -> None:
    code = """
import jax, bitnet_jax
config = bitnet_jax.PRESETS["tiny"]
latent = jax.eval_shape(lambda: bitnet_jax.Transformer(config).init(jax.random.key(0), jax.numpy.zeros((1, 1), int)))
bitnet_jax.pack, bitnet_jax.prove, bitnet_jax.load_model, bitnet_jax.save_packed, bitnet_jax.generate
"""
    assert loaded_after(code, "flax", *TRAINING) == {"flax"}
