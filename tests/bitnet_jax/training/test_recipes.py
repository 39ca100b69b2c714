"""Every named recipe trains: ten updates of a tiny language model on one text decrease a finite loss."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from bitnet_jax.models import ModelConfig, Transformer
from bitnet_jax.quantization.precision import Precision
from bitnet_jax.quantization.recipes import RECIPES
from bitnet_jax.training.optimizers import OptimizerConfig, make_optimizer
from bitnet_jax.training.state import TrainState
from bitnet_jax.training.step import make_train_step
from bitnet_jax.training.task import init_variables, model_loss

pytestmark = pytest.mark.extended

STEPS = 10
# 256 inputs everywhere, so that the largest scale groups and the Hadamard rotation fit.
SHAPE: dict[str, Any] = {
    "vocab_size": 17,
    "hidden_size": 256,
    "ffn_size": 256,
    "num_layers": 1,
    "num_heads": 2,
    "max_length": 8,
    "mlp": "relu",
}
# Latents near 0 make codes that are coin flips, whose noise hides what ten updates can learn.
RANDOM = ("binaryconnect_stochastic",)

PRECISIONS: dict[
    Precision, str
] = {}  # every Precision that some recipe assigns to a layer, and one such recipe
for _name, _recipe in RECIPES.items():
    for _precision in (_recipe,) if isinstance(_recipe, Precision) else (value for _, value in _recipe):
        PRECISIONS.setdefault(_precision, _name)
UNSIGNED = "elastic_unsigned"  # for inputs after a ReLU, where all signs are 1
SIGNS = ("sign", "sign_absmean", "elastic_signed")
# Codes without a scale, whose sums dominate the residual stream: models of one layer.
UNSCALED = ("binary_raw", "binary_stochastic")
LINEARS = ("attention/v_proj", "attention/o_proj", "mlp/up_proj", "mlp/down_proj")


def shared_models() -> list[dict[str, Precision]]:
    """Path -> Precision of models of three layers or one, that give each Precision of PRECISIONS a linear layer."""
    waiting = [p for p in PRECISIONS if p.weight not in UNSCALED]
    models: list[dict[str, Precision]] = []
    while waiting:
        models.append({})
        for layer, name in itertools.product(range(3), LINEARS):
            if name == "mlp/down_proj":
                fitting = [p for p in waiting if p.activation not in SIGNS]
                fitting.sort(key=lambda p: p.activation != UNSIGNED)
            else:
                fitting = [p for p in waiting if p.activation != UNSIGNED]
            chosen = fitting[0] if fitting else Precision()
            models[-1][f"layers_{layer}/{name}"] = chosen
            waiting = [p for p in waiting if p != chosen]
    return models + [{"layers_0/mlp/up_proj": p} for p in PRECISIONS if p.weight in UNSCALED]


MODELS = shared_models()


class Training:
    """A model with its compiled update, and one batch of random tokens."""

    def __init__(self, config: ModelConfig, accumulate: int = 1) -> None:
        self.optimizer = make_optimizer(OptimizerConfig(learning_rate=3e-3, schedule="constant"), STEPS)
        self.update = make_train_step(
            model_loss(Transformer(config)),
            self.optimizer,
            total_steps=STEPS,
            precisions=config.precisions(),
            accumulate=accumulate,
            statistics_every=0,  # tested elsewhere; leaving them out halves compilation time
        )
        tokens = np.random.default_rng(0).integers(0, 17, (4, 9)).astype(np.int32)
        self.batch = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}
        self.variables = jax.jit(init_variables, static_argnums=0)(config, jax.random.key(0))

    def run(self, only: str | None = None) -> tuple[TrainState, list[float]]:
        """The state after ten updates of all parameters, or of one linear layer's, and the loss of each update."""
        state = TrainState.create(jax.tree.map(jnp.copy, self.variables), self.optimizer)
        losses = []
        for _ in range(STEPS):
            state, metrics = self.update(state, self.batch, jax.random.key(1))
            assert bool(metrics["finite"])
            losses.append(float(metrics["loss"]))
            if only is not None:
                state = state.replace(params=with_layer_of(self.variables["params"], state.params, only))
        return state, losses


def with_layer_of(params: Any, others: Any, path: str) -> dict[str, Any]:
    """Copies of `params`, in which the linear layer at `path` is that of `others`."""
    flat = flatten_dict(others, sep="/")
    return unflatten_dict(
        {
            name: flat[name] if name.startswith(f"{path}/") else jnp.copy(leaf)
            for name, leaf in flatten_dict(params, sep="/").items()
        },
        sep="/",
    )


def training_of(chosen: dict[str, Precision]) -> Training:
    layers = len({path.split("/")[0] for path in chosen})
    return Training(
        ModelConfig(**SHAPE | {"num_layers": layers}, precision=(*chosen.items(), ("*", "float32")))
    )


@pytest.mark.slow(after=1)
@pytest.mark.parametrize("chosen", MODELS)
def test_the_precisions_of_all_recipes_learn_together(chosen: dict[str, Precision]) -> None:
    """Recipes share models, because compilation dominates the time: each Precision has a layer in one of them."""
    assert {precision for model in MODELS for precision in model.values()} >= set(PRECISIONS)
    state, losses = training_of(chosen).run()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.slow  # a minute; gradients are compared with their formulas in nn/test_linear.py
@pytest.mark.parametrize("chosen", MODELS)
def test_the_precisions_of_all_recipes_learn_alone(chosen: dict[str, Precision]) -> None:
    """The other layers learn regardless of any single one. With all others frozen, a layer whose gradient is zero or
    has the wrong sign does not reduce the loss."""
    training = training_of(chosen)
    for path, precision in chosen.items():
        _, alone = training.run(only=path)
        recipe = PRECISIONS[precision]
        if recipe not in RANDOM:
            assert alone[-1] < 0.9 * alone[0], f"{recipe} at {path}, alone"


@pytest.mark.slow  # one compilation each; the test above checks the same for every Precision in shared models
@pytest.mark.parametrize("recipe", RECIPES)
def test_ten_updates_of_each_recipe_are_finite_and_learn(recipe: str) -> None:
    state, losses = Training(ModelConfig(**SHAPE, precision=recipe)).run()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))
    # The same four lines ten times: a layer without a working gradient would still let the embedding learn
    # them a little; with a wrong sign anywhere the loss would not drop this far from ln 17 = 2.83.
    if recipe not in RANDOM:
        assert losses[-1] < 0.8 * losses[0]


def test_int8_products_train_equally_well() -> None:
    options: dict[str, Any] = {"dtype": "bfloat16", "head": "int8"}
    losses = {
        product: np.array(
            Training(ModelConfig(**SHAPE, precision="bitnet_b158", product=product, **options), 2).run()[1]
        )
        for product in ("float", "int8", "int8_gradients")
    }
    # The same sums, and gradients that differ at most by rounding, which may flip a code and change a loss slightly.
    np.testing.assert_allclose(losses["int8"], losses["float"], rtol=1e-3)
    # Rounded gradients differ (the first loss precedes them) but are as good.
    assert losses["int8_gradients"][0] == losses["float"][0]
    assert (losses["int8_gradients"][1:] != losses["float"][1:]).all()
    learned = {product: values[0] - values[-1] for product, values in losses.items()}
    assert learned["int8_gradients"] > 0.95 * learned["float"]
