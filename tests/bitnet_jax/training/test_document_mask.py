"""Packed sequences with document masks: the loss and its gradients are those of the documents alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitnet_jax.data import TokenBatches
from bitnet_jax.models import ModelConfig, Transformer, init_variables
from bitnet_jax.training.config import RunConfig
from bitnet_jax.training.task import language_loss, language_task

S = 0  # the separator
SHORT, LONG = np.array([[5, 1, 7], [2, 2, 6]]), np.array([[3, 9, 4, 1, 8], [6, 2, 9, 9, 5]])


def stream() -> np.ndarray:
    """Two windows of the same length: a short document and a long one, and the other way round."""
    return np.concatenate([[S], SHORT[0], [S], LONG[0], [S], LONG[1], [S], SHORT[1], [S]]).astype(np.int32)


def alone(documents: np.ndarray) -> dict[str, np.ndarray]:
    """One document per row: it begins after a separator, and the next one is predicted at its end."""
    rows = np.pad(documents, ((0, 0), (1, 1)), constant_values=S).astype(np.int32)
    return {"inputs": rows[:, :-1], "targets": rows[:, 1:]}


def packed(length: int = 10) -> dict[str, np.ndarray]:
    batches = TokenBatches(stream(), length, batch_size=2, separator=S)
    return batches.batch(0)


def test_a_batch_tells_documents_and_positions_apart() -> None:
    batch = packed()
    order = np.argsort(batch["inputs"][:, 1])[::-1]  # the window that begins with LONG[1], 6, comes first
    assert batch["segments"][order].tolist() == [[1] * 6 + [2] * 4, [1] * 4 + [2] * 6]
    assert batch["positions"][order].tolist() == [[*range(6), *range(4)], [*range(4), *range(6)]]
    inside = packed(length=4)  # windows that begin inside documents
    for inputs, segments, positions in zip(
        *(inside[k] for k in ("inputs", "segments", "positions")), strict=True
    ):
        begun, since = 0, 0
        for at, token in enumerate(inputs):
            begun, since = (begun + 1, 0) if token == S else (begun, since + (at > 0))
            assert (segments[at], positions[at]) == (begun, since)
    whole = TokenBatches(stream(), 4, 4, separator=S)
    for name, array in whole.batch(1).items():
        np.testing.assert_array_equal(whole.batch(1, slice(1, 3))[name], array[1:3])


@pytest.mark.slow(after=1)
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"attention": "relu"},
        {"sliding_window": 3},
        {"position": "learned", "dtype": "bfloat16"},
        {"attention": "binary_qk"},
    ],
    ids=str,
)
def test_packed_sequences_train_as_their_documents_alone(fields: dict[str, str | int]) -> None:
    config = ModelConfig(
        vocab_size=10, hidden_size=16, num_layers=2, num_heads=2, ffn_size=16, max_length=10, precision="float32",
        init_std=0.3, **fields,
    )  # fmt: skip
    variables, loss = init_variables(config, jax.random.key(0)), language_loss(Transformer(config))

    @jax.jit
    def sums(params: dict, batch: dict) -> tuple[jax.Array, dict]:
        return jax.value_and_grad(lambda params: loss({"params": params}, batch, None, 1.0)[0].loss)(params)

    value, gradient = sums(variables["params"], packed())
    parts = [sums(variables["params"], alone(documents)) for documents in (SHORT, LONG)]
    expected = jax.tree.map(jnp.add, *parts)
    # Sums of at most 20 terms in another order: float32 rounds to 6e-8, bfloat16 to 4e-3.
    tolerance = 3e-2 if "dtype" in fields else 2e-5
    np.testing.assert_allclose(value, expected[0], rtol=tolerance)
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected[1]))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * largest),
        gradient,
        expected[1],
    )
    unmasked = {name: array for name, array in packed().items() if name in ("inputs", "targets")}
    assert abs(float(sums(variables["params"], unmasked)[0] / value) - 1) > 2 * tolerance


def test_the_setting_reaches_the_batches_and_unsuitable_ones_are_refused(
    tmp_path: Path, run_config: Callable[..., RunConfig]
) -> None:
    (tmp_path / "a.txt").write_text("one text, and no separator " * 40)
    data = {"source": "a.txt", "root": str(tmp_path), "split": "tail", "document_mask": True}
    batch = language_task(run_config(data=data)).train_batch(0)
    assert set(batch) == {"inputs", "targets", "segments", "positions"}
    with pytest.raises(ValueError, match="the tokenizer 'char', which has no token that separates"):
        language_task(run_config(data=data | {"tokenizer": "char"}))
    with pytest.raises(ValueError, match="document_mask: got model.attention 'linear'"):
        run_config(data=data, model={"attention": "linear"})
    assert run_config(data={"document_mask": False}).hash() == run_config(data={}).hash()
