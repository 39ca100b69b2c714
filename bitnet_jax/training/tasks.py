"""The tasks of a run config by name, and the classification tasks: images and texts."""

from __future__ import annotations

import dataclasses
import itertools
import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
from jaxtyping import PyTree

from bitnet_jax.data import (
    Classes,
    ExampleBatches,
    Tokenizer,
    load_images,
    load_labelled_text,
    whole_batches,
)
from bitnet_jax.data.batches import EVERY_ROW
from bitnet_jax.evaluation.classifiers import score_classifier
from bitnet_jax.models import Architecture
from bitnet_jax.training.config import RunConfig
from bitnet_jax.training.distillation import distilled_loss, make_teacher
from bitnet_jax.training.sentence_vectors import sentence_task
from bitnet_jax.training.task import Task, initial_variables, language_task, model_loss


def image_task(config: RunConfig) -> Task:
    """Image classification.

    Raises:
      DataError (a ValueError): the images are unusable.
      ValueError: the model does not fit the data.
    """
    data, model = config.data, config.image_model_config()
    sets = load_images(
        data.source,
        size=data.image_size,
        limit=data.limit,
        root=data.root,
        test_with_valid=data.valid_fraction if data.test else None,
    )
    expected = tuple(getattr(model, name) for name in ("image_size", "image_size", "channels"))
    if sets.train.images.shape[1:] != expected:
        raise ValueError(
            f"got images of {sets.train.images.shape[1:]}, expected the model's {expected}; change model.image_size "
            "and model.channels, or data.image_size"
        )
    parts = [
        {"inputs": part.images, "targets": part.labels}
        for part in (sets.train, sets.valid, sets.test)
        if part is not None
    ]
    classes = Classes("images", tuple(range(sets.classes)), pixels=sets.pixels, data=dataclasses.asdict(data))
    return _classification(config, model, parts, classes, None)


def text_task(config: RunConfig) -> Task:
    """Text classification, from labels or a teacher (section `distillation`).

    Raises:
      DataError (a ValueError): the texts are unusable.
      ValueError: the model or the teacher does not fit.
      RunError, CheckpointError: the teacher cannot be read.
    """
    data = config.data
    texts = load_labelled_text(
        data.source,
        length=data.length,
        tokenizer=data.tokenizer,
        valid_source=data.valid_source,
        valid_fraction=data.valid_fraction,
        test=data.test,
        limit=data.limit,
        root=data.root,
    )
    model = config.model_config(texts.tokenizer.vocab_size)
    settings = dataclasses.asdict(data)
    classes = Classes("text_classification", texts.classes, length=data.length, data=settings)
    parts = [texts.train, texts.valid] + ([] if texts.test is None else [texts.test])
    task = _classification(config, model, parts, classes, texts.tokenizer)
    if config.distillation.teacher is None:
        return task
    teacher = make_teacher(config.distillation, model)
    return task._replace(
        loss=distilled_loss(model.module(), config.distillation),
        train_batch=lambda step, rows=EVERY_ROW: teacher(task.train_batch(step, rows)),
    )


def _classification(
    config: RunConfig,
    model: Architecture,
    parts: Sequence[Mapping[str, np.ndarray]],
    classes: Classes,
    tokenizer: Tokenizer | None,
) -> Task:
    got = model.num_classes  # type: ignore[attr-defined]  # every classifier's config has it
    if got != len(classes.names):
        raise ValueError(
            f"model.num_classes: got {got}, expected the {len(classes.names)} classes of the data"
        )
    train, *held_out_parts = parts
    batches = ExampleBatches(train, config.data.batch_size, config.seed)
    held_out = config.evaluation
    valid, *test = (
        list(itertools.islice(whole_batches(part, held_out.batch_size), held_out.batches))
        for part in held_out_parts
    )

    def evaluate(
        part: Sequence[Mapping[str, np.ndarray]], variables: Mapping[str, PyTree]
    ) -> dict[str, float]:
        return score_classifier(model, variables, part).summary()

    return Task(
        init=partial(initial_variables, config, model),
        loss=model_loss(model.module(), config.training.z_loss),
        train_batch=batches.batch,
        tokens=config.data.batch_size,
        evaluate=partial(evaluate, valid),
        test=partial(evaluate, test[0]) if test else None,
        precisions=model.precisions(),
        tokenizer=tokenizer,
        fingerprint=_fingerprint(train),
        classes=classes,
    )


def _fingerprint(examples: Mapping[str, np.ndarray]) -> int:
    checksum = 0
    for name in sorted(examples):
        checksum = zlib.crc32(np.ascontiguousarray(examples[name]).view(np.uint8).data, checksum)
    return checksum


TASKS: dict[str, Callable[[RunConfig], Task]] = {
    "language": language_task,
    "images": image_task,
    "text_classification": text_task,
    "sentence_vectors": sentence_task,
}
