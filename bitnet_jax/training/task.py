"""What the loop needs to know of a problem, and how a run config becomes one."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from bitnet_jax.data import TokenBatches, Tokenizer, consecutive_batches, load_corpus
from bitnet_jax.evaluation.language import evaluate, model_logits
from bitnet_jax.models import ModelConfig, Transformer
from bitnet_jax.precision import Precision
from bitnet_jax.training.config import RunConfig
from bitnet_jax.training.losses import LossSums, cross_entropy_sums
from bitnet_jax.training.step import Batch, LossFunction


class Task(NamedTuple):
    """A problem as pure functions and batches; the loop sees no model and no text."""

    init: Callable[[PRNGKeyArray], PyTree]  # key -> parameters
    loss: LossFunction
    train_batch: Callable[[int], Batch]  # number of updates done -> batch of the next one
    tokens: int  # targets of a training batch
    evaluate: Callable[[PyTree], dict[str, float]]  # parameters -> held-out measurements, one of them "loss"
    precisions: Mapping[str, Precision]
    tokenizer: Tokenizer
    fingerprint: int  # of the training data: a run must not go on with another text


def model_loss(model: Transformer, z_loss: float = 0.0) -> LossFunction:
    """Cross entropy of `targets` given `inputs`; a batch may have `mask` (inputs), `weights` (targets).

    A key switches dropout and stochastic quantizers on.
    """

    def loss(
        params: PyTree, batch: Batch, key: PRNGKeyArray | None, progress: Float[Array, ""] | float
    ) -> LossSums:
        rngs = {} if key is None else dict(zip(("dropout", "stochastic"), jax.random.split(key), strict=True))
        output: Any = model.apply(
            {"params": params},
            batch["inputs"],
            mask=batch.get("mask"),
            progress=progress,
            deterministic=key is None,
            rngs=rngs,
        )
        return cross_entropy_sums(output.logits, batch["targets"], batch.get("weights"), z_loss)

    return loss


def init_params(config: ModelConfig, key: PRNGKeyArray) -> dict[str, Any]:
    return Transformer(config).init(key, jnp.zeros((1, 1), jnp.int32))["params"]


def abstract_params(config: ModelConfig) -> dict[str, Any]:
    """The same tree as shapes and dtypes, without computing it."""
    return jax.eval_shape(lambda key: init_params(config, key), jax.random.key(0))


def language_task(config: RunConfig) -> Task:
    """Next-token prediction on the run's text.

    Raises:
      DataError (a ValueError): the text cannot be used.
      ValueError: the model does not fit the data.
    """
    corpus = load_corpus(
        config.data.source,
        tokenizer=config.data.tokenizer,
        split=config.data.split,
        valid_fraction=config.data.valid_fraction,
        valid_source=config.data.valid_source,
        root=config.data.root,
    )
    length, held_out = config.data.length, config.evaluation
    batches = TokenBatches(corpus.train, length, config.data.batch_size, config.seed, config.data.sampling)
    end = None if held_out.batches is None else held_out.batches * held_out.batch_size * length + 1
    valid_batches = list(consecutive_batches(corpus.valid[:end], length, held_out.batch_size))
    model_config = config.model_config(corpus.tokenizer.vocab_size)

    def evaluate_params(params: PyTree) -> dict[str, float]:
        score = evaluate(
            model_logits(model_config), {"params": params}, valid_batches, corpus.tokenizer.count_bytes
        )
        return {
            "loss": score.nats_per_token,
            "bits_per_byte": score.bits_per_byte,
            "perplexity": score.perplexity,
        }

    return Task(
        init=partial(init_params, model_config),
        loss=model_loss(Transformer(model_config), config.training.z_loss),
        train_batch=batches.batch,
        tokens=config.data.batch_size * length,
        evaluate=evaluate_params,
        # A tied head has no latents of its own: what happens to its codes happens to the embedding.
        precisions={
            path: precision
            for path, precision in model_config.precisions().items()
            if path != "lm_head" or not model_config.tie_embeddings
        },
        tokenizer=corpus.tokenizer,
        fingerprint=zlib.crc32(np.ascontiguousarray(corpus.train).view(np.uint8).data),
    )
