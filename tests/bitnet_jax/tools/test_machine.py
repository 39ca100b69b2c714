"""Machine reports: the kernel chosen for a matrix, and for each layer of a model."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from bitnet_jax.models import ModelConfig, Transformer
from bitnet_jax.packed import packing
from bitnet_jax.tools.machine import chosen, local_choice
from bitnet_kernels import cpu

TINY = ModelConfig(vocab_size=16, hidden_size=32, ffn_size=32, num_layers=1, num_heads=2, max_length=16)


def test_without_the_library_the_reference_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "available_isas", lambda: ())
    monkeypatch.setattr(cpu, "unavailable", lambda: "_cpu.so was not built")
    assert local_choice().name == "reference"


@pytest.mark.extended(after=1)
@pytest.mark.parametrize(
    ("precision", "names"),
    [
        ("float32", []),
        ("bitnet_b158", ["cpu"]),
        ("bitnet_weight_only", ["reference"]),
        ((("layers_0/mlp/*", "bitnet_weight_only"), ("*", "bitnet")), ["cpu", "reference"]),
    ],
)
def test_chosen_lists_the_kernels_of_a_model(precision: object, names: list[str]) -> None:
    if not cpu.available_isas():
        pytest.skip(f"no C++ kernels: {cpu.unavailable()}")
    config = ModelConfig(**{**TINY.to_dict(), "precision": precision})
    params = Transformer(config).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    choices = chosen(config, packing.pack(params, config))
    assert [choice.name for choice in choices] == names
    assert chosen(config, {"params": params}) == []
