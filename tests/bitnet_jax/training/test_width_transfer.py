"""Width transfer: factors by parameter, models that are rejected, and updates that do not grow with width."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bitnet_jax.models import ModelConfig, Transformer
from bitnet_jax.training import RunConfig
from bitnet_jax.training.optimizers import make_optimizer
from bitnet_jax.training.task import abstract_variables, initial_variables
from bitnet_jax.training.width_transfer import rate_factors, scaled_initial

MODEL = dict(vocab_size=16, num_layers=1, num_heads=2, ffn_size=8, max_length=4, hidden_size=8)
Leaves = dict[str, Any]


def leaves(tree: Any) -> Leaves:
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def test_factors_by_parameter() -> None:
    config = ModelConfig(**MODEL, precision="paretoq_2", tie_embeddings=False, use_bias=True)
    params = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), abstract_variables(config)["params"])
    by_adam, by_muon = (leaves(rate_factors(params, 4.0, name)) for name in ("adamw", "muon"))
    initial = leaves(scaled_initial(params, 4.0))
    expected = {
        "layers_0/attention/q_proj/weight": (1 / 2, 1 / 4, 1 / 2),
        "layers_0/mlp/down_proj/weight": (1 / 2, 1 / 4, 1 / 2),
        "layers_0/mlp/down_proj/weight_scale": (1 / 2, 1 / 2, 1 / 2),
        "final_norm/scale": (1 / 4, 1 / 4, 1 / 4),
        "layers_0/mlp/down_proj/bias": (1, 1, 1),
        "layers_0/attention_norm/scale": (1, 1, 1),
        "embed/embedding": (1, 1, 1),
        "lm_head/weight": (1, 1, 1),
    }
    for path, factors in expected.items():
        assert (float(np.asarray(initial[path]).flat[0]), by_adam[path], by_muon[path]) == factors, path


def test_the_width_of_a_run_follows_its_model() -> None:
    def config(**optimizer: Any) -> RunConfig:
        return RunConfig.from_dict(
            {"model": MODEL | {"vocab_size": 256}, "data": {"length": 4}, "optimizer": optimizer}
        )

    assert (config().width_ratio, config(base_width=2).width_ratio) == (1.0, 4.0)
    later = dict(name="adamw", moments="float32", base_width=None, ema_decay=None)
    assert config(**later).hash() == config().hash() != config(base_width=8).hash()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (dict(precision="binaryconnect"), r"q_proj has weight='binary_raw'.*choose another recipe"),
        (dict(precision="xnor"), r"latent_clip=1\.0"),
        (dict(norm_scale=False), r"norm_scale=False, expected True"),
    ],
)
def test_models_whose_size_does_not_follow_their_latents_are_rejected(model: Any, message: str) -> None:
    fields = {
        "model": MODEL | {"vocab_size": 256} | model,
        "data": {"length": 4},
        "optimizer": {"base_width": 8},
    }
    with pytest.raises(ValueError, match=message):
        RunConfig.from_dict(fields)


def test_a_run_on_images_is_rejected() -> None:
    model = dict(architecture="mlp", hidden_size=8, num_layers=1, image_size=4, channels=1, num_classes=2)
    with pytest.raises(ValueError, match=r"base_width: got 8 for task 'images'"):
        RunConfig.from_dict({"task": "images", "model": model, "optimizer": {"base_width": 8}})


def logits_change(width: int, base: int | None) -> float:
    """Standard deviation of what two updates add to the logits."""
    fields = MODEL | dict(hidden_size=width, ffn_size=3 * width, num_heads=width // 8, vocab_size=256)
    settings = dict(schedule="constant", learning_rate=0.01, base_width=base)
    config = RunConfig.from_dict({"model": fields, "data": {"length": 4}, "optimizer": settings})
    model = config.model_config(256)
    params = first = initial_variables(config, model, jax.random.key(0))["params"]
    optimizer = make_optimizer(config.optimizer, 100, config.width_ratio)
    tokens = jax.random.randint(jax.random.key(1), (16, 5), 0, 256)

    def logits(params: Any) -> jax.Array:
        output: Any = Transformer(model).apply({"params": params}, tokens[:, :-1])
        return output.logits

    def loss(params: Any) -> jax.Array:
        return -jnp.mean(
            jnp.take_along_axis(jax.nn.log_softmax(logits(params)), tokens[:, 1:, None], axis=-1)
        )

    @jax.jit
    def update(params: Any, state: Any, step: jax.Array) -> tuple[Any, Any]:
        updates, state = optimizer.update(jax.grad(loss)(params), state, params, step)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for step in range(2):
        params, state = update(params, state, jnp.int32(step))
    return float(jnp.std(logits(params) - logits(first)))


@pytest.mark.slow  # three compilations
def test_updates_change_the_logits_of_a_wide_ternary_model_as_much_as_of_a_narrow_one() -> None:
    narrow, wide, plain = (logits_change(width, base) for width, base in ((16, 16), (128, 16), (128, None)))
    assert narrow / 2 < wide < 2 * narrow
    assert plain > 3 * narrow
