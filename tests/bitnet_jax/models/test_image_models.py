"""MLP, CNN and vision transformer: paths, configs, and packed equal to latent."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from bitnet_jax.models import Architecture, BinaryCNNConfig, ModelConfig, Transformer, model_config
from bitnet_jax.models.binary_cnn import pooled
from bitnet_jax.packed import packing
from bitnet_jax.packed.proof import prove

IMAGE = {"image_size": 8, "num_classes": 5}
SHAPES: dict[str, dict[str, Any]] = {
    "mlp": {"hidden_size": 32},
    "cnn": {"widths": (8, 16), "convolutions": 2, "shortcut": True},
    "vision_transformer": {
        "patch_size": 4, "hidden_size": 32, "ffn_size": 64, "num_layers": 1, "num_heads": 2, "mlp": "relu",
    },
}  # fmt: skip
IMAGES = jnp.asarray(np.random.default_rng(0).standard_normal((6, 8, 8, 1)), jnp.float32)


def config_of(architecture: str, **changes: Any) -> Architecture:
    return model_config({"architecture": architecture, **IMAGE, **SHAPES[architecture], **changes})


@lru_cache
def trained(config: Architecture) -> dict[str, Any]:
    """Variables with non-initial batch statistics, and latents larger than at initialization."""
    model = config.module()
    variables = jax.jit(model.init)(jax.random.key(1), IMAGES)
    observe = jax.jit(lambda v: model.apply(v, IMAGES, deterministic=False, mutable=["batch_stats"])[1])
    for _ in range(20 if "batch_stats" in variables else 0):
        variables = variables | observe(variables)
    return variables


@pytest.mark.parametrize("architecture", SHAPES)
def test_a_config_round_trips_through_json_and_names_the_parameters(architecture: str) -> None:
    config = config_of(architecture)
    assert type(config).from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert hash(config) == hash(config_of(architecture))
    params = flatten_dict(trained(config)["params"], sep="/")
    matrices = {path: leaf.shape for path, leaf in params.items() if path.endswith("/weight")}
    assert matrices == {f"{path}/weight": shape for path, shape in config.linear_shapes().items()}
    ends = [path for path, p in config.precisions().items() if not p.quantizes_weights]
    assert len(ends) == 2


@pytest.mark.extended
@pytest.mark.parametrize(
    ("architecture", "precision"),
    [
        ("mlp", "bnn"),
        ("mlp", "bitnet_b158"),
        ("cnn", "xnor"),
        ("cnn", "lsq4"),
        ("vision_transformer", "bit"),
    ],
)
def test_packed_models_are_equal_to_latent_models(architecture: str, precision: str) -> None:
    ends = (
        {"first": "float32"}
        if architecture == "vision_transformer"
        else {"first": "bitnet", "last": precision}
    )
    config = config_of(architecture, precision=precision, **ends)
    latent = trained(config)
    statistics = {name: part for name, part in latent.items() if name == "batch_stats"}
    packed = packing.pack(latent["params"], config) | statistics
    proof = prove(config, latent, packed, IMAGES)
    assert proof.matrices == len(config.packed_formats()) > 1
    assert proof.logits == 6 * 5


@pytest.mark.extended
def test_a_packed_text_classifier_is_equal_to_the_latent_one() -> None:
    config = ModelConfig(
        vocab_size=50, hidden_size=32, ffn_size=64, num_layers=1, num_heads=2, max_length=12, mlp="relu",
        num_classes=3, causal=False, attention="binary", precision="bit_relu",
    )  # fmt: skip
    tokens = jax.random.randint(jax.random.key(0), (4, 12), 0, 50)
    mask = jnp.arange(12)[None] < jnp.array([12, 3, 7, 1])[:, None]
    latent = {"params": jax.jit(Transformer(config).init)(jax.random.key(1), tokens)["params"]}
    packed = packing.pack(latent["params"], config)
    assert prove(config, latent, packed, tokens, mask).matrices == 6


def integer_products(config: Architecture, variables: dict[str, Any]) -> dict[str, np.ndarray]:
    """Path -> output of its linear layer, before any further operation."""

    @jax.jit
    def run(variables: dict[str, Any]) -> dict[str, Any]:
        _, seen = config.module().apply(
            variables,
            IMAGES,
            capture_intermediates=lambda module, _: type(module).__name__ in ("BitLinear", "BitConv"),
            mutable=["intermediates"],
        )
        return seen

    seen = run(variables)
    found = flatten_dict(seen["intermediates"], sep="/")
    return {path.removesuffix("/__call__"): np.asarray(y[0]) for path, y in found.items()}


@pytest.mark.extended(after=1)
@pytest.mark.parametrize("architecture", SHAPES)
def test_xnor_products_equal_float_products_exactly(architecture: str) -> None:
    """Without a scale the layers give sums of +-1 products: integers with the parity of k, bit-identical."""
    config = config_of(architecture, precision="bnn")
    latent = trained(config)
    packed = {**latent, **packing.pack(latent["params"], config)}
    theirs, ours = integer_products(config, latent), integer_products(config, packed)
    checked = 0
    for path, precision in config.precisions().items():
        if not precision.quantizes_weights:
            continue
        k = config.linear_shapes()[path][1]
        np.testing.assert_array_equal(ours[path], theirs[path], err_msg=path)
        np.testing.assert_array_equal((ours[path] + k) % 2, 0)
        assert len(np.unique(ours[path])) > 2
        checked += 1
    assert checked >= 2


@pytest.mark.parametrize("shortcut", [True, False])
def test_the_shortcut_carries_the_image_past_silenced_convolutions(shortcut: bool) -> None:
    """Binary convolutions whose batch norm has gain 0 carry no information about the image; the shortcut does."""
    config = config_of("cnn", shortcut=shortcut)
    variables = trained(config)
    params = {
        name: leaf | {"scale": jnp.zeros_like(leaf["scale"])}
        if name.startswith("conv_1") and "_norm" in name
        else leaf
        for name, leaf in variables["params"].items()
    }
    output: Any = jax.jit(config.module().apply)(variables | {"params": params}, IMAGES)
    assert bool(np.ptp(output.logits, axis=0).max() > 1e-3) == shortcut


def test_pooling() -> None:
    x = jnp.arange(2 * 5 * 4 * 3, dtype=jnp.float32).reshape(2, 5, 4, 3)
    np.testing.assert_array_equal(pooled(x, "max"), nn.max_pool(x, (2, 2), (2, 2)))
    corners = [np.asarray(x)[:, i:4:2, j::2] for i in (0, 1) for j in (0, 1)]
    np.testing.assert_array_equal(pooled(x, "mean"), sum(corners) / 4)


@pytest.mark.parametrize(
    ("architecture", "change", "message"),
    [
        ("mlp", {"norm": "layernorm"}, "model.norm: got 'layernorm', expected one of batch"),
        ("mlp", {"hidden_size": 0}, "model.hidden_size: got 0, expected a positive integer"),
        ("mlp", {"widths": (2,)}, "field of model: got 'widths'"),
        ("cnn", {"widths": (8, 12)}, r"model.widths: got \(8, 12\), expected multiples"),
        ("cnn", {"widths": (8,)}, r"model.widths: got \(8,\), expected positive integers"),
        ("cnn", {"image_size": 1}, "model.image_size: got 1, expected at least 2"),
        ("vision_transformer", {"patch_size": 3}, "image_size=8 is not a multiple of patch_size=3"),
        ("vision_transformer", {"causal": True}, "patches have no order"),
        ("vision_transformer", {"num_classes": 0}, "model.num_classes: got 0"),
    ],
)
def test_invalid_configs_are_rejected(architecture: str, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_of(architecture, **change)


def test_the_error_names_an_unknown_architecture() -> None:
    with pytest.raises(ValueError, match="model.architecture: got 'rnn', expected one of transformer, mlp"):
        model_config({"architecture": "rnn"})


def test_a_config_accepts_lists_for_tuples() -> None:
    assert BinaryCNNConfig(**IMAGE, widths=[8, 16]).widths == (8, 16)  # type: ignore[arg-type]  # as in JSON
