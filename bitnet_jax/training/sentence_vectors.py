"""Training an encoder of sentences to give the vectors of a teacher, such as the float model that it starts from.

    hidden          sum over layers of |S - T|^2 / |T|^2, S and T the outputs of a block at the real tokens of the batch
    vectors         1 - s.t, for the unit vectors of a text
    similarities    mean over the pairs of texts in the batch of (s_i.s_j - t_i.t_j)^2

No labels are needed: any sentences will do (hidden states as in TinyBERT 1909.10351, similarities as in 1904.05068).
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree

from bitnet_jax.data import ExampleBatches, whole_batches
from bitnet_jax.data.batches import EVERY_ROW
from bitnet_jax.data.corpus import load_tokenizer
from bitnet_jax.data.sentences import Sentences, load_sentences
from bitnet_jax.models import Transformer
from bitnet_jax.models.transformer import Block
from bitnet_jax.training.config import RunConfig
from bitnet_jax.training.config_sections import DistillationConfig
from bitnet_jax.training.initial import read_initial
from bitnet_jax.training.losses import LossSums
from bitnet_jax.training.step import Batch, LossFunction, ModelState
from bitnet_jax.training.task import Task, forward, initial_variables

Hidden = Float[Array, "layers B T D"]


def hidden_distance(student: Hidden, teacher: Hidden, mask: Bool[Array, "B T"]) -> Float[Array, ""]:
    """Relative squared distance of the outputs of every block over all real tokens, summed over layers."""
    real = mask.astype(jnp.float32)[None, :, :, None]
    distance = jnp.sum(real * jnp.square(student - teacher), axis=(1, 2, 3))
    return jnp.sum(distance / jnp.maximum(jnp.sum(real * jnp.square(teacher), axis=(1, 2, 3)), 1e-12))


def similarity_distance(student: Float[Array, "B D"], teacher: Float[Array, "B D"]) -> Float[Array, ""]:
    """Mean squared difference of the cosines of all pairs of different texts; 0 for a single text."""
    B = student.shape[0]
    difference = (student @ student.T - teacher @ teacher.T) * (1 - jnp.eye(B))
    return jnp.sum(jnp.square(difference)) / max(1, B * (B - 1))


def outputs(
    model: nn.Module,
    variables: Mapping[str, PyTree],
    batch: Batch,
    key: PRNGKeyArray | None,
    progress: Float[Array, ""] | float,
) -> tuple[Hidden, Float[Array, "B D"]]:
    """The outputs of all blocks, and the unit vectors."""
    output, state = forward(model, variables, batch, key, progress, ("intermediates",), capture=_of_block)
    blocks = state["intermediates"]
    hidden = [blocks[f"layers_{i}"]["__call__"][0][0] for i in range(len(blocks))]
    return jnp.stack(hidden).astype(jnp.float32), output.logits


def _of_block(module: nn.Module, method: str) -> bool:
    return isinstance(module, Block) and method == "__call__"


def distance_sums(
    config: DistillationConfig, hidden: Hidden, vectors: Float[Array, "B D"], batch: Batch
) -> LossSums:
    """The weighted sum of the three distances to `teacher` of the batch, times the texts; a row of padding is none.

    `correct` is the sum of the cosines, so that the accuracy of a training row is their mean.
    """
    teacher = batch["teacher"]
    real = jnp.any(batch["mask"], axis=1, keepdims=True)
    count = jnp.sum(real.astype(jnp.float32))
    own, wanted = (jnp.where(real, x, 0.0) for x in (vectors, teacher["vectors"]))
    cosines = jnp.sum(own * wanted)
    distance = (
        config.hidden * hidden_distance(hidden, teacher["hidden"], batch["mask"])
        + config.vectors * (1 - cosines / count)
        + config.similarities * similarity_distance(own, wanted)
    )
    return LossSums(count * distance, cosines, count)


def vectors_loss(model: nn.Module, config: DistillationConfig) -> LossFunction:
    """`distance_sums` of the model's outputs."""

    def loss(
        variables: Mapping[str, PyTree],
        batch: Batch,
        key: PRNGKeyArray | None,
        progress: Float[Array, ""] | float,
    ) -> tuple[LossSums, ModelState]:
        return distance_sums(config, *outputs(model, variables, batch, key, progress), batch), {}

    return loss


def sentence_task(config: RunConfig) -> Task:
    """Vectors of sentences, from the teacher in section `distillation`.

    Raises:
      DataError (a ValueError): the texts are unusable.
      ValueError: the teacher or the model does not fit.
      RunError, CheckpointError, StorageError: the teacher cannot be read.
    """
    data, held_out, distillation = config.data, config.evaluation, config.distillation
    source = distillation.teacher or config.init
    assert source is not None  # checked by RunConfig
    tokenizer = load_tokenizer(data.tokenizer, root=data.root)
    parts = load_sentences(
        data.source,
        tokenizer,
        length=data.length,
        begin=data.begin_tokens or (),
        end=data.end_tokens or (),
        valid_source=data.valid_source,
        valid_fraction=data.valid_fraction,
        test=data.test,
        limit=data.limit,
        root=data.root,
    )
    model = config.model_config(tokenizer.vocab_size)
    teacher = read_initial(source, "distillation.teacher")
    if teacher.config.pooling == "none" or teacher.tokenizer.to_json() != tokenizer.to_json():
        raise ValueError(
            f"distillation.teacher: got {source}, expected an encoder with the tokenizer of the run"
        )
    for name in ("hidden_size", "num_layers"):
        if getattr(teacher.config, name) != getattr(model, name):
            raise ValueError(
                f"distillation.teacher: got {name}={getattr(teacher.config, name)}, expected the run's "
                f"{getattr(model, name)}"
            )

    @jax.jit
    def taught(params: PyTree, inputs: Array, mask: Array) -> dict[str, Array]:
        batch = {"inputs": inputs, "mask": mask}
        hidden, vectors = outputs(Transformer(teacher.config), {"params": params}, batch, None, 1.0)
        return {"hidden": hidden, "vectors": vectors}

    def with_teacher(batch: Batch) -> Batch:
        return {**batch, "teacher": taught(teacher.params, batch["inputs"], batch["mask"])}

    batches = ExampleBatches(parts.train, data.batch_size, config.seed)
    measured = jax.jit(partial(_measured, Transformer(model), distillation))
    evaluate = partial(_evaluate, measured, with_teacher)

    def of(part: Sentences) -> Callable[[Mapping[str, PyTree]], dict[str, float]]:
        some = list(itertools.islice(whole_batches(part, held_out.batch_size), held_out.batches))
        return partial(evaluate, some)

    return Task(
        init=partial(initial_variables, config, model),
        loss=vectors_loss(Transformer(model), distillation),
        train_batch=lambda step, rows=EVERY_ROW: with_teacher(batches.batch(step, rows)),
        tokens=data.batch_size * data.length,
        evaluate=of(parts.valid),
        test=None if parts.test is None else of(parts.test),
        precisions=model.precisions(),
        tokenizer=tokenizer,
        fingerprint=zlib.crc32(np.ascontiguousarray(parts.train["inputs"]).view(np.uint8).data),
    )


def _measured(
    model: nn.Module, config: DistillationConfig, variables: Mapping[str, PyTree], batch: Batch
) -> tuple[LossSums, Float[Array, "B D"]]:
    hidden, vectors = outputs(model, variables, batch, None, 1.0)
    return distance_sums(config, hidden, vectors, batch), vectors


def _evaluate(
    measured: Callable[..., tuple[LossSums, Array]],
    with_teacher: Callable[[Batch], Batch],
    batches: Sequence[Batch],
    variables: Mapping[str, PyTree],
) -> dict[str, float]:
    """loss, cosine (mean), rank_correlation (Spearman, of the cosines of all pairs of texts)."""
    totals, students, teachers = np.zeros(3), [], []
    for batch in map(with_teacher, batches):
        sums, vectors = measured(variables, batch)
        real = np.asarray(batch["mask"]).any(axis=1)
        totals += np.array([float(x) for x in sums])
        students.append(np.asarray(vectors)[real])
        teachers.append(np.asarray(batch["teacher"]["vectors"])[real])
    student, teacher = np.concatenate(students), np.concatenate(teachers)
    pairs = np.triu_indices(len(student), 1)
    cosines = [(x @ x.T)[pairs] for x in (student, teacher)]
    correlation = scipy.stats.spearmanr(*cosines).statistic if len(student) > 2 else 0.0
    return {
        "loss": totals[0] / totals[2],
        "cosine": totals[1] / totals[2],
        "rank_correlation": float(correlation),
    }
