"""Sections of run settings: data, training, evaluation, distillation, adapter."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from bitnet_jax.nn.config import LARGEST


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Section `data`: the dataset and its batches. Names and paths are validated by their readers."""

    # language: stdlib (the running Python's standard library), a path, or hf:NAME (see data/text.py); images: drawn
    # or a folder of MNIST files (data/images.py); text_classification: keywords or JSON lines (data/labelled_text.py);
    # sentence_vectors: a file with one text per line (data/sentences.py)
    source: str = "stdlib"
    mixture: Mapping[str, float] | None = (
        None  # language: source -> weight, instead of `source`; see data/mixtures.py
    )
    root: str | None = None  # base folder of relative paths; None: working directory, then $BITNET_JAX_DATA
    tokenizer: str = "byte"  # byte, char, or the path of a tokenizer.json
    split: str = "document"  # what is held out: document, tail or record (see split_documents)
    valid_fraction: float = 0.05
    valid_source: str | None = None  # hold out all of this source instead
    # Also hold out a test part, measured once, after the last update: as much again as valid_fraction; or what is held
    # out otherwise (valid_source, MNIST's own), and then valid_fraction of the rest is held out for validation.
    test: bool = False
    length: int = 128  # T, tokens per training sequence
    image_size: int | None = None  # images: downsample to this height and width
    limit: int | None = None  # images, text_classification: maximum number of training examples
    batch_size: int = 16  # B, sequences or images per update (all micro-batches together)
    # epoch: reshuffled passes over all windows; shuffle: the same in constant memory, by the package grain; windows:
    # random positions
    sampling: str = "epoch"
    skip_bad_files: bool = False  # folders of text: skip unreadable files instead of raising an error
    document_mask: bool = False  # language: attend within a document only, positions from its start
    begin_tokens: list[int] | None = None  # sentence_vectors: before every text; set by `init`
    end_tokens: list[int] | None = None  # ... and after it

    @property
    def sources(self) -> tuple[str, ...]:
        return (self.source,) if self.mixture is None else tuple(self.mixture)

    def __post_init__(self) -> None:
        if self.mixture is not None:
            if not self.mixture or min(self.mixture.values()) <= 0:
                raise ValueError(
                    f"data.mixture: got {dict(self.mixture)}, expected sources with positive weights"
                )
            # The order of the sources matters, and a config file does not keep it.
            weights = {source: float(weight) for source, weight in sorted(self.mixture.items())}
            object.__setattr__(self, "mixture", weights)
            for name, one in (("source", "stdlib"), ("tokenizer", "char"), ("sampling", "windows")):
                if (getattr(self, name) == one) != (name == "source"):
                    raise ValueError(
                        f"data.{name}: got {getattr(self, name)!r} beside data.mixture, which names the sources "
                        "and needs one tokenizer and sampling epoch or shuffle; remove it"
                    )
        for name in ("length", "image_size", "limit", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"data.{name}: got {value}, expected at least 1")
        largest = 0.5 if self.test and self.valid_source is None else 1  # each part gets valid_fraction
        used = (self.valid_source is None or self.test) and self.split != "record"
        if used and not 0 < self.valid_fraction < largest:
            raise ValueError(
                f"data.valid_fraction: got {self.valid_fraction}, expected a number between 0 and {largest}, such as "
                "0.05"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Section `training`: duration, logging, evaluation and checkpointing."""

    steps: int = 1000  # updates
    accumulate: int = 1  # micro-batches per update; divides data.batch_size
    z_loss: float = 0.0  # weight of (log Z)^2 in the loss
    max_loss: float | None = None  # a loss above it counts as divergence, as NaN does; None: only NaN and inf
    spike_factor: float | None = (
        None  # so does a loss this many deviations above recent ones (spikes.py), such as 10
    )
    spike_window: int = 100  # number of recent losses
    max_returns: int = (
        0  # returns to the last checkpoint, with other batches, before the run ends as diverged
    )
    log_every: int = 50  # updates between rows with per-layer statistics and throughput
    scan_layers: bool = False  # compile one block per kind of layer, not one per layer (models/stacked.py)
    statistics_every: int = 1  # updates between measurements of the codes (flips, zeros, clips); 0: never
    eval_every: int = 250  # updates between evaluations on held-out data; the last update is always evaluated
    checkpoint_every: int = 250
    keep_checkpoints: int = 2
    keep_best: bool = False  # also keep the checkpoint with the lowest held-out loss
    tensorboard: bool = False  # also write TensorBoard files (optional package tensorboardX)

    def __post_init__(self) -> None:
        least = {"steps": 1, "accumulate": 1, "log_every": 1, "eval_every": 1, "checkpoint_every": 1}
        least |= {
            "statistics_every": 0,
            "z_loss": 0,
            "keep_checkpoints": 2,
            "spike_window": 2,
            "max_returns": 0,
        }
        for name, low in least.items():
            if not low <= getattr(self, name) <= LARGEST:  # updates are counted in int32
                raise ValueError(
                    f"training.{name}: got {getattr(self, name)}, expected a number from {low} to {LARGEST}"
                )
        if self.spike_factor is not None and self.spike_factor <= 0:
            raise ValueError(
                f"training.spike_factor: got {self.spike_factor}, expected a positive number or None"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Section `evaluation`: evaluation on held-out data during training."""

    batches: int | None = 20  # from the start of the held-out data; None: all of them
    batch_size: int = 16
    samples: int = (
        0  # language: greedy continuations of held-out text written at each evaluation (samples.py)
    )
    sample_tokens: int = 32  # their length

    def __post_init__(self) -> None:
        if self.samples < 0 or self.sample_tokens < 1:
            raise ValueError(
                f"evaluation: got samples={self.samples}, sample_tokens={self.sample_tokens}, expected at least 0 and 1"
            )
        if self.batch_size < 1 or (self.batches is not None and self.batches < 1):
            raise ValueError(
                f"evaluation: got batches={self.batches}, batch_size={self.batch_size}, expected at least 1"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillationConfig:
    """Section `distillation`: training from a teacher. See training/distillation.py, for a text classifier, and
    training/sentence_vectors.py, for an encoder of sentences."""

    # Folder of a run; None: no distillation. sentence_vectors: of a run or packed model; None: `init`
    teacher: str | None = None
    labels: float = 0.0  # weight of the cross entropy with the true classes
    logits: float = 1.0  # weight of the cross entropy with the teacher's probabilities
    temperature: float = 1.0  # divides the logits of student and teacher
    relations: float = 0.0  # weight of the distance between the Q, K and V similarity matrices
    hidden: float = 1.0  # sentence_vectors: weight of the distance between hidden states
    vectors: float = 1.0  # ... of 1 - cosine of both vectors of a text
    similarities: float = 1.0  # ... of the distance between the cosines of the texts of a batch

    def __post_init__(self) -> None:
        for name in ("labels", "logits", "relations", "hidden", "vectors", "similarities"):
            if getattr(self, name) < 0:
                raise ValueError(f"distillation.{name}: got {getattr(self, name)}, expected 0 or more")
        if self.temperature <= 0:
            raise ValueError(f"distillation.temperature: got {self.temperature}, expected a positive number")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """Section `adapter`: train a low-rank adapter on the frozen packed model `init`. See training/adapter_task.py."""

    rank: int | None = None  # r; None: no adapter, all parameters are trained
    alpha: float = 16.0  # the adapter's output is multiplied by alpha / rank
    layers: list[str] = dataclasses.field(default_factory=lambda: ["*"])  # patterns, such as "*/attention/*"
    base: str | None = None  # fingerprint of `init`; set when the run begins

    def __post_init__(self) -> None:
        if self.rank is not None and not 1 <= self.rank <= LARGEST:
            raise ValueError(f"adapter.rank: got {self.rank}, expected a positive number or None")
        if self.alpha <= 0:
            raise ValueError(f"adapter.alpha: got {self.alpha}, expected a positive number")
        if not self.layers:
            raise ValueError(
                "adapter.layers: got none, expected patterns of paths of linear layers, such as '*'"
            )
