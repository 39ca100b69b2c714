"""The loss of a language model in pieces: the same sums and gradients, without all logits in memory. Its data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitnet_jax.models import ModelConfig, Transformer
from bitnet_jax.training import task
from bitnet_jax.training.config import RunConfig
from bitnet_jax.training.task import init_variables, language_loss, language_task, loss_pieces, model_loss

VOCAB, B, T = 4096, 2, 24
HEADS: dict[str, dict[str, Any]] = {
    "tied": {"tie_embeddings": True},
    "untied": {"tie_embeddings": False},
    "int8": {"tie_embeddings": True, "head": "int8"},
}


def problem(**fields: Any) -> tuple[Transformer, dict[str, Any], dict[str, jax.Array]]:
    config = ModelConfig(
        vocab_size=VOCAB, hidden_size=32, ffn_size=64, num_layers=1, num_heads=2, max_length=T, **fields
    )
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(0, VOCAB, (B, T + 1)), jnp.int32)
    weights = jnp.asarray(rng.random((B, T)), jnp.float32)
    batch = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "weights": weights}
    return Transformer(config), dict(init_variables(config, jax.random.key(0))), batch


@pytest.mark.parametrize("head", HEADS)
def test_pieces_give_the_sums_and_gradients_of_the_whole(head: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, variables, batch = problem(**HEADS[head])

    def run(loss: task.LossFunction) -> Any:
        def total(params: Any) -> tuple[jax.Array, Any]:
            sums, _ = loss({"params": params}, batch, None, 1.0)
            return sums.loss, sums

        return jax.jit(jax.value_and_grad(total, has_aux=True))(variables["params"])

    (_, sums), gradients = run(model_loss(model, 1e-4))
    monkeypatch.setitem(task.MOST_LOGITS, "cpu", B * T * VOCAB // 4)
    (_, our_sums), our_gradients = run(language_loss(model, 1e-4))
    # Sums over B T targets in another order.
    for ours, theirs in zip(our_sums, sums, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    jax.tree.map(
        lambda ours, theirs: np.testing.assert_allclose(
            ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max()
        ),
        our_gradients,
        gradients,
    )


def test_pieces_keep_the_logits_out_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    model, variables, batch = problem(**HEADS["tied"])

    def temporary_bytes(most: int) -> int:
        monkeypatch.setitem(task.MOST_LOGITS, "cpu", most)
        loss = language_loss(model)
        gradient = jax.grad(lambda params: loss({"params": params}, batch, None, 1.0)[0].loss)
        memory = jax.jit(gradient).lower(variables["params"]).compile().memory_analysis()
        assert memory is not None
        return memory.temp_size_in_bytes

    all_logits = 4 * B * T * VOCAB
    assert temporary_bytes(B * T * VOCAB) > all_logits
    assert temporary_bytes(B * T * VOCAB // 12) < all_logits


@pytest.mark.parametrize(
    ("targets", "vocab", "pieces"),
    [((8, 256), 256, 1), ((8, 256), 32_000, 8), ((1, 7), 2**21, 7), ((64, 6), 2**20, 6)],
)
def test_the_number_of_pieces_divides_the_length(targets: tuple[int, int], vocab: int, pieces: int) -> None:
    assert loss_pieces(targets, vocab) == pieces


def test_a_mixture_trains_on_every_source(
    tmp_path: Path, run_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for letter in "ab":
        (tmp_path / letter).write_text(letter * 400)
    data = {
        "mixture": {"b": 1, "a": 3.0},
        "split": "tail",
        "valid_fraction": 0.2,
        "length": 4,
        "batch_size": 64,
    }
    config = run_config(data=data)
    assert list(config.data.mixture.items()) == [("a", 3.0), ("b", 1.0)]
    assert RunConfig.from_json(config.to_json()).hash() == config.hash() != run_config().hash()
    task = language_task(config)
    drawn = np.concatenate([task.train_batch(step)["targets"] for step in range(64)])  # a whole cycle
    assert np.mean(drawn[:, 1] == ord("a")) == 0.75
    one = language_task(run_config(data=data | {"mixture": {"a": 1}}))
    alone = language_task(run_config(data={"source": "b", "split": "tail"}))
    assert len({task.fingerprint, one.fingerprint, alone.fingerprint}) == 3
    for wrong, expected in (
        ({"mixture": {}}, "expected sources with positive weights"),
        ({"mixture": {"a": 0.0}}, "expected sources with positive weights"),
        ({"mixture": {"a": "1"}}, "data.mixture: got"),
        ({"source": "a"}, "data.source: got 'a' beside data.mixture"),
        ({"tokenizer": "char"}, "data.tokenizer: got 'char' beside data.mixture"),
    ):
        with pytest.raises(ValueError, match=expected):
            run_config(data=data | wrong)
