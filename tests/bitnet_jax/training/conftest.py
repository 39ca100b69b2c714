"""A toy problem that compiles quickly: one quantized matrix between an embedding and a softmax."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitnet_jax.data import ByteTokenizer
from bitnet_jax.quantization.precision import Precision
from bitnet_jax.training.config import RunConfig
from bitnet_jax.training.losses import LossSums, cross_entropy_sums
from bitnet_jax.training.task import Task


@pytest.fixture(scope="package", autouse=True)
def compiled_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """These tests rebuild the same few jitted updates: a compilation cache makes XLA compile each only once."""
    settings = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture
def orbax_litter() -> Iterator[None]:
    """When it reads a damaged checkpoint, Orbax leaves unawaited coroutines behind; that is not a failure."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "unraisablehook", lambda unraisable: None)
        yield
        gc.collect()


V, D, B, T = 5, 6, 4, 3
TERNARY = Precision(weight="ternary_absmean")


def toy_variables(key: jax.Array) -> dict[str, Any]:
    embed, out = jax.random.split(key)
    params = {
        "embed": {"embedding": jax.random.normal(embed, (V, D))},
        "out": {"weight": jax.random.normal(out, (V, D))},
    }
    return {
        "params": params,
        "counts": {"batches": jnp.zeros((), jnp.int32), "sum": jnp.zeros((), jnp.float32)},
    }


def toy_logits(variables: Mapping[str, Any], inputs: jax.Array) -> jax.Array:
    params = variables["params"]
    weight = TERNARY.quantize_weight(params["out"]["weight"]).dequantize()
    return params["embed"]["embedding"][inputs] @ weight.T


def toy_loss(
    variables: Any, batch: Mapping[str, Any], key: Any, progress: Any
) -> tuple[LossSums, dict[str, Any]]:
    """Its model state counts batches and, like batch norm, keeps a decaying average of their contents."""
    counts, inputs = variables["counts"], jnp.asarray(batch["inputs"])
    counts = {
        "batches": counts["batches"] + 1,
        "sum": 0.9 * counts["sum"] + jnp.sum(inputs).astype(jnp.float32),
    }
    logits = toy_logits(variables, inputs)
    return cross_entropy_sums(logits, batch["targets"], batch.get("weights")), {"counts": counts}


def toy_batch(step: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(step)
    inputs = rng.integers(0, V, (B, T), np.int32)
    return {"inputs": inputs, "targets": (inputs + 1) % V}


def toy_evaluate(variables: Any) -> dict[str, float]:
    batch = toy_batch(10**6)
    sums = cross_entropy_sums(toy_logits(variables, batch["inputs"]), batch["targets"])
    return {"loss": float(sums.loss / sums.weight)}


@pytest.fixture
def toy() -> Task:
    return Task(
        init=toy_variables,
        loss=toy_loss,
        train_batch=toy_batch,
        tokens=B * T,
        evaluate=toy_evaluate,
        precisions={"out": TERNARY},
        tokenizer=ByteTokenizer(),
        fingerprint=1,
    )


MODEL = dict(hidden_size=8, num_layers=1, num_heads=2, ffn_size=8)


@pytest.fixture
def run_config() -> Callable[..., RunConfig]:
    """A run config with fields of any section replaced: run_config(training=dict(steps=3))."""

    def build(**sections: Any) -> RunConfig:
        small = {
            "model": MODEL,
            "data": dict(length=8, batch_size=2),
            "optimizer": dict(learning_rate=1e-2),
            "training": dict(steps=6, log_every=2, eval_every=3, checkpoint_every=2),
        }
        merged = {
            name: small.get(name, {}) | sections.get(name, {}) for name in small | sections if name != "seed"
        }
        return RunConfig.from_dict(merged | {"seed": sections.get("seed", 0)})

    return build


def jnp_tree(tree: Any) -> Any:
    return jax.tree.map(jnp.asarray, tree)
