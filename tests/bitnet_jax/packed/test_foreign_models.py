"""A user-defined flax module with BitLinear layers: trained, packed and proved unchanged."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jaxtyping import Array

import bitnet_jax
from bitnet_jax.models import Architecture
from bitnet_jax.nn import BitLinear, precisions_of
from bitnet_jax.packed import PackingError, pack, prove
from bitnet_jax.quantization import RECIPES, Precision

TERNARY, BINARY, LEARNED = (RECIPES[name] for name in ("bitnet_b158", "bitnet", "paretoq_1.58"))


class Mixer(nn.Module):
    """One block of MLP-Mixer (2105.01601): a float stem, tokens mixed in binary, channels in ternary, a float head."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = nn.Dense(32, name="stem")(x)
        y = jnp.swapaxes(nn.LayerNorm()(x), 1, 2)
        y = BitLinear(8, BINARY, name="tokens_out")(nn.gelu(BitLinear(16, BINARY, name="tokens_in")(y)))
        x = x + jnp.swapaxes(y, 1, 2)
        x = x + Channels(name="channels")(nn.LayerNorm()(x))
        return nn.Dense(3, name="head")(jnp.mean(x, axis=1))


class Channels(nn.Module):
    @nn.compact
    def __call__(self, x: Array) -> Array:
        return BitLinear(32, LEARNED, name="down")(nn.gelu(BitLinear(64, TERNARY, name="up")(x)))


PRECISIONS = {"tokens_in": BINARY, "tokens_out": BINARY, "channels/up": TERNARY, "channels/down": LEARNED}
IMAGES = jnp.asarray(np.random.default_rng(1).standard_normal((24, 8, 12)), jnp.float32)
LABELS = jnp.asarray(np.argmax(np.mean(IMAGES, axis=1)[:, :3], axis=-1), jnp.int32)


@pytest.fixture(scope="module")
def trained() -> dict[str, Any]:
    """Parameters after an ordinary flax training loop; the loss decreases."""
    model, optimizer = Mixer(), optax.adam(1e-2)

    def loss(params: Any) -> Array:
        logits = model.apply({"params": params}, IMAGES)
        return optax.softmax_cross_entropy_with_integer_labels(logits, LABELS).mean()

    @jax.jit
    def step(params: Any, state: Any) -> tuple[Any, Any, Array]:
        value, gradients = jax.value_and_grad(loss)(params)
        with jax.numpy_dtype_promotion("standard"):  # optax's decay ** step
            updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(params, updates), state, value

    params = model.init(jax.random.key(0), IMAGES)["params"]
    state, losses = optimizer.init(params), []
    for _ in range(30):
        params, state, value = step(params, state)
        losses.append(float(value))
    assert losses[-1] < losses[0] / 2
    return params


def test_precisions_are_read_from_the_module() -> None:
    assert precisions_of(Mixer(), IMAGES) == PRECISIONS
    assert list(precisions_of(Mixer(), jax.ShapeDtypeStruct(IMAGES.shape, jnp.float32))) == list(PRECISIONS)


@pytest.mark.extended
def test_a_foreign_module_is_packed_and_proved(trained: dict[str, Any]) -> None:
    packed = pack(trained, PRECISIONS)
    assert {name: sorted(part) for name, part in packed["packed"].items()} == {
        "tokens_in": ["weight"],
        "tokens_out": ["weight"],
        "channels": ["down", "up"],
    }
    assert packed["params"].keys() == trained.keys() - packed["packed"].keys(), (
        "latent weights and scales are gone"
    )
    proof = prove(Mixer(), {"params": trained}, packed, IMAGES, precisions=PRECISIONS)
    assert (proof.matrices, proof.logits, proof.tokens_identical) == (4, 24 * 3, 0)


def test_a_wrong_weight_or_precision_is_detected(trained: dict[str, Any]) -> None:
    packed = pack(trained, PRECISIONS)
    other = {**trained, "tokens_in": {"weight": -trained["tokens_in"]["weight"]}}
    with pytest.raises(PackingError, match="tokens_in: code"):
        prove(Mixer(), {"params": other}, packed, IMAGES, precisions=PRECISIONS)
    with pytest.raises(PackingError, match="tokens_in: the packed format is binary, expected ternary2"):
        prove(Mixer(), {"params": trained}, packed, IMAGES, precisions={**PRECISIONS, "tokens_in": TERNARY})
    with pytest.raises(PackingError, match=r"nowhere/weight: got none, expected the matrix"):
        pack(trained, {"nowhere": TERNARY})
    with pytest.raises(PackingError, match=r"channels/up: got granularity=48 for 32 inputs"):
        pack(trained, {"channels/up": dataclasses.replace(TERNARY, granularity=48)})


def test_a_module_requires_precisions_and_a_config_provides_them(trained: dict[str, Any]) -> None:
    packed = pack(trained, PRECISIONS)
    with pytest.raises(ValueError, match="got a module without precisions"):
        prove(Mixer(), {"params": trained}, packed, IMAGES)
    with pytest.raises(ValueError, match="got a config and precisions"):
        prove(MixerConfig(), {"params": trained}, packed, IMAGES, precisions=PRECISIONS)


@dataclasses.dataclass(frozen=True)
class MixerConfig(Architecture):
    """The same module as an Architecture: the interface that training, statistics and packing require."""

    precision: Any = (("tokens_*", BINARY), ("channels/up", TERNARY), ("channels/down", LEARNED))
    ternary_format: str = "ternary5"

    def module(self) -> nn.Module:
        return Mixer()

    def example_input(self) -> Array:
        return jnp.zeros((1, 8, 12))

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        return {
            "tokens_in": (16, 8),
            "tokens_out": (8, 16),
            "channels/up": (64, 32),
            "channels/down": (32, 64),
        }


def test_a_user_defined_architecture_needs_no_registration(trained: dict[str, Any]) -> None:
    config = MixerConfig()
    assert config.precisions() == PRECISIONS
    packed = pack(trained, config)
    assert packed["packed"]["channels"]["up"]["weight"].format == "ternary5"
    assert prove(config, {"params": trained}, packed, IMAGES).matrices == 4


def test_names_that_a_file_cannot_store_are_rejected_before_writing(
    trained: dict[str, Any], tmp_path: Any
) -> None:
    config = MixerConfig()
    with pytest.raises(ValueError, match="got a MixerConfig, expected a config class with a registered name"):
        bitnet_jax.save_packed(tmp_path / "packed", pack(trained, config), config)
    assert list(tmp_path.iterdir()) == []


def test_an_unquantized_layer_is_unchanged(trained: dict[str, Any]) -> None:
    packed = pack(trained, {"tokens_in": Precision(), "tokens_out": BINARY})
    assert list(packed["packed"]) == ["tokens_out"]
    assert (packed["params"]["tokens_in"]["weight"] == trained["tokens_in"]["weight"]).all()


class WithFlag(nn.Module):
    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        y = BitLinear(4, BINARY, name="one")(x)
        return y + 1 if train else y


def test_call_flags_stay_python_values() -> None:
    assert precisions_of(WithFlag(), jnp.ones((2, 8)), train=False) == {"one": BINARY}


def test_a_module_may_have_a_list_attribute() -> None:
    """As nn.Sequential does, which therefore cannot be hashed."""
    x, stack = jnp.ones((2, 8)), nn.Sequential([BitLinear(16, BINARY), BitLinear(4, TERNARY)])
    latent, precisions = stack.init(jax.random.key(0), x), precisions_of(stack, x)
    packed = pack(latent["params"], precisions)
    assert prove(stack, latent, packed, x, precisions=precisions).matrices == 2


class Pair(nn.Module):
    @nn.compact
    def __call__(self, x: Array) -> tuple[Array, Array]:
        y = BitLinear(4, BINARY, name="one")(x)
        return y, y


def test_the_error_names_an_output_without_logits() -> None:
    x = jnp.ones((2, 8))
    latent = Pair().init(jax.random.key(0), x)
    packed = pack(latent["params"], {"one": BINARY})
    with pytest.raises(PackingError, match="got a tuple from Pair, expected logits"):
        prove(Pair(), latent, packed, x, precisions={"one": BINARY})
