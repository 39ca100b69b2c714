"""The task interface of the training loop, and the language modelling task of a run config."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from bitnet_jax.data import (
    Classes,
    MeasuredStream,
    MixedBatches,
    TokenBatches,
    Tokenizer,
    consecutive_batches,
    load_corpus,
)
from bitnet_jax.evaluation.language import evaluate, model_logits
from bitnet_jax.models import Architecture, ModelConfig, Transformer, init_variables
from bitnet_jax.models.stacked import equal_layers, stack
from bitnet_jax.models.transformer import LanguageHead
from bitnet_jax.nn.context import context_parts, cut
from bitnet_jax.nn.placement import automatic_axes
from bitnet_jax.quantization.precision import Precision
from bitnet_jax.training.config import RunConfig
from bitnet_jax.training.losses import LossSums, cross_entropy_sums
from bitnet_jax.training.samples import Sampler, make_sampler
from bitnet_jax.training.step import Batch, LossFunction, ModelState
from bitnet_jax.training.width_transfer import scaled_initial

# Most logits in memory at once: 32 MB on a CPU, 512 MB elsewhere, where small products leave a device idle.
MOST_LOGITS = {"cpu": 2**23, "other": 2**27}


class Task(NamedTuple):
    """A task as pure functions and batches; the loop is independent of model and data."""

    init: Callable[[PRNGKeyArray], Mapping[str, PyTree]]  # key -> variables: "params" and other collections
    loss: LossFunction
    # (number of updates done, rows=slice(None)) -> these rows of the batch of the next one
    train_batch: Callable[..., Batch]
    tokens: int  # targets per training batch
    evaluate: Callable[[Mapping[str, PyTree]], dict[str, float]]  # variables -> metrics, including "loss"
    precisions: Mapping[str, Precision]
    tokenizer: Tokenizer | None  # None: the data is not text
    fingerprint: int  # of the training data: a run must not resume on other data
    classes: Classes | None = None  # only for classifiers
    sample: Sampler | None = None  # only for language models, if the run writes samples
    data: Mapping[str, Any] | None = None  # JSON, for the result: what was read, and which files were skipped
    # As `evaluate`, on the test part of the data, if data.test asks for one
    test: Callable[[Mapping[str, PyTree]], dict[str, float]] | None = None
    # Collections of the loss's variables besides the state: arguments of the update that it does not change
    frozen: Mapping[str, PyTree] = {}


def model_loss(model: nn.Module, z_loss: float = 0.0) -> LossFunction:
    """Cross entropy of `targets` given `inputs`; a batch may have `weights` (targets), and what is said of the inputs:
    `mask`, `segments`, `positions` (see Transformer).

    Passing a key enables dropout, stochastic quantizers and batch statistics.
    """

    def loss(
        variables: Mapping[str, PyTree],
        batch: Batch,
        key: PRNGKeyArray | None,
        progress: Float[Array, ""] | float,
    ) -> tuple[LossSums, ModelState]:
        output, state = forward(model, variables, batch, key, progress, ("batch_stats",))
        return cross_entropy_sums(output.logits, batch["targets"], batch.get("weights"), z_loss), state

    return loss


def language_loss(model: Transformer, z_loss: float = 0.0) -> LossFunction:
    """`model_loss` of a language model, without the logits of a whole batch in memory where they are many.

    The sequence is cut into pieces (see `loss_pieces`). The logits of a piece are computed, reduced to sums and, in the
    backward pass, computed again.
    """
    head, whole = LanguageHead(model.config), model_loss(model, z_loss)

    def loss(
        variables: Mapping[str, PyTree],
        batch: Batch,
        key: PRNGKeyArray | None,
        progress: Float[Array, ""] | float,
    ) -> tuple[LossSums, ModelState]:
        pieces = loss_pieces(batch["targets"].shape, model.config.vocab_size)
        if pieces == 1:
            return whole(variables, batch, key, progress)
        output, state = forward(
            model, variables, batch, key, progress, ("batch_stats",)
        )  # its logits are not used
        rngs = {} if key is None else {"stochastic": jax.random.split(key)[1]}

        @jax.checkpoint
        def sums(hidden: Array, targets: Array, weights: Array) -> LossSums:
            logits: Any = head.apply(variables, hidden, progress, rngs=rngs)
            return cross_entropy_sums(logits, targets, weights, z_loss)

        weights = batch.get("weights", jnp.ones(batch["targets"].shape, jnp.float32))
        parts = [cut(jnp.asarray(x), pieces) for x in (output.hidden, batch["targets"], weights)]
        return jax.tree.map(jnp.sum, jax.lax.map(lambda part: sums(*part), parts)), state

    return loss


def loss_pieces(targets: tuple[int, int], vocab_size: int) -> int:
    """The fewest pieces of a sequence for which the logits of a piece are at most MOST_LOGITS on a device.

    Args:
      targets: sequences, of all devices, and their length.
    """
    sequences, length = targets
    devices = math.prod(automatic_axes().values())
    most = MOST_LOGITS["cpu" if jax.default_backend() == "cpu" else "other"]
    own = length // context_parts(length)  # targets of a device, in a sequence
    fitting = (
        pieces
        for pieces in range(1, own + 1)
        if own % pieces == 0 and sequences * (length // pieces) * vocab_size <= most * devices
    )
    return next(fitting, own)


def forward(
    model: nn.Module,
    variables: Mapping[str, PyTree],
    batch: Batch,
    key: PRNGKeyArray | None,
    progress: Float[Array, ""] | float,
    mutable: tuple[str, ...],
    capture: Callable[[nn.Module, str], bool] | bool = False,
) -> tuple[Any, ModelState]:
    """The model's output on a batch, and its collections named in `mutable`.

    Args:
      capture: the outputs of which modules are kept in the collection intermediates, see flax's `apply`.
    """
    rngs = {} if key is None else dict(zip(("dropout", "stochastic"), jax.random.split(key), strict=True))
    described = {name: batch[name] for name in ("mask", "segments", "positions") if name in batch}
    output, state = model.apply(
        variables,
        batch["inputs"],
        **described,
        progress=progress,
        deterministic=key is None,
        rngs=rngs,
        mutable=list(mutable),
        capture_intermediates=capture,
    )
    return output, dict(state)


def initial_variables(config: RunConfig, model: Architecture, key: PRNGKeyArray) -> dict[str, PyTree]:
    """`init_variables`, with the initial values that optimizer.base_width asks for, and equal layers stacked if they
    are to be scanned over."""
    variables: dict[str, PyTree] = init_variables(model, key)
    variables |= {"params": scaled_initial(variables["params"], config.width_ratio)}
    if not config.training.scan_layers:
        return variables
    assert isinstance(model, ModelConfig)  # checked by RunConfig
    return stack(variables, equal_layers(model))


def abstract_variables(config: Architecture) -> dict[str, Any]:
    """Shapes and dtypes of `init_variables`, without computing it."""
    return jax.eval_shape(lambda key: init_variables(config, key), jax.random.key(0))


def language_task(config: RunConfig) -> Task:
    """Next-token prediction on the run's text.

    Raises:
      DataError (a ValueError): the text is unusable.
      ValueError: the model does not fit the data.
    """
    data, held_out = config.data, config.evaluation
    corpora = [
        load_corpus(
            source,
            tokenizer=data.tokenizer,
            split=data.split,
            valid_fraction=data.valid_fraction,
            valid_source=data.valid_source,
            test=data.test,
            root=data.root,
            skip_bad_files=data.skip_bad_files,
        )
        for source in data.sources
    ]
    tokenizer = corpora[0].tokenizer
    separator = tokenizer.eos_id if data.document_mask else None
    if data.document_mask and separator is None:
        raise ValueError(
            f"data.document_mask: got the tokenizer {data.tokenizer!r}, which has no token that separates documents, "
            "expected one that has; train it with `bitnet-jax tokenize`, or use byte"
        )
    streams = [
        TokenBatches(corpus.train, data.length, data.batch_size, config.seed, data.sampling, separator)
        for corpus in corpora
    ]
    batches = streams[0] if data.mixture is None else MixedBatches(streams, tuple(data.mixture.values()))
    end = None if held_out.batches is None else held_out.batches * held_out.batch_size * data.length + 1

    def held_out_batches(part: str) -> Iterator[dict[str, np.ndarray]]:
        """Of every source; one valid_source belongs to all of them."""
        separate = data.valid_source is not None and (part == "test") == data.test
        for corpus in corpora[:1] if separate else corpora:
            stream = (
                MeasuredStream(corpus.valid, corpus.valid_token_bytes) if part == "valid" else corpus.test
            )
            assert stream is not None
            yield from consecutive_batches(
                stream.tokens[:end], data.length, held_out.batch_size, token_bytes=stream.token_bytes[:end]
            )

    for part in ("valid", "test")[: 1 + data.test]:
        next(held_out_batches(part))  # an unusable text is an error before the training, not after it
    model_config = config.model_config(tokenizer.vocab_size)

    def evaluate_variables(part: str, variables: Mapping[str, PyTree]) -> dict[str, float]:
        score = evaluate(model_logits(model_config), variables, held_out_batches(part))
        return {
            "loss": score.nats_per_token,
            "bits_per_byte": score.bits_per_byte,
            "perplexity": score.perplexity,
        }

    return Task(
        init=partial(initial_variables, config, model_config),
        loss=language_loss(Transformer(model_config), config.training.z_loss),
        train_batch=batches.batch,
        tokens=data.batch_size * data.length,
        evaluate=partial(evaluate_variables, "valid"),
        test=partial(evaluate_variables, "test") if data.test else None,
        # A tied head shares its latents with the embedding.
        precisions={
            path: precision
            for path, precision in model_config.precisions().items()
            if path != "lm_head" or not model_config.tie_embeddings
        },
        tokenizer=tokenizer,
        data={source: corpus.summary() for source, corpus in zip(data.sources, corpora, strict=True)},
        fingerprint=_combined([corpus.fingerprint for corpus in corpora]),
        sample=make_sampler(model_config, tokenizer, corpora[0].valid, held_out),
    )


def _combined(fingerprints: Sequence[int]) -> int:
    """One fingerprint of several; that of one alone."""
    if len(fingerprints) == 1:
        return fingerprints[0]
    return zlib.crc32(json.dumps(fingerprints).encode())
