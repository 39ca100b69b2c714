"""Run settings: frozen dataclasses, one per section, that reject unknown names and wrong types."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Collection, Mapping
from typing import Any

from ml_collections import ConfigDict

from bitnet_jax.models import Architecture, ModelConfig, model_config
from bitnet_jax.names import check_name
from bitnet_jax.training.config_sections import (
    AdapterConfig,
    DataConfig,
    DistillationConfig,
    EvaluationConfig,
    TrainingConfig,
)
from bitnet_jax.training.distributed import DistributedConfig
from bitnet_jax.training.optimizers import OptimizerConfig
from bitnet_jax.training.sections import flatten, is_a, plain, section_of
from bitnet_jax.training.sharding import MeshConfig, check_context
from bitnet_jax.training.width_transfer import check_transferable

# Settings that may change when a run resumes. Most affect only what is measured, kept and shown: the updates are the
# same. For the effect of training.steps see `loop.fit`; scan_layers changes rounding, as the mesh does, and the random
# numbers of dropout and of stochastic quantizers.
CHANGEABLE_ON_RESUME = frozenset(
    f"training.{name}"
    for name in (
        "steps",
        "log_every",
        "eval_every",
        "checkpoint_every",
        "keep_checkpoints",
        "tensorboard",
        "scan_layers",
    )
)
# Sections that say where a run is computed, not what; they are not part of a run's identity.
WHERE_COMPUTED = ("mesh", "distributed")
# Settings that did not exist when runs and results were recorded: the hash leaves them out while they have their
# default, so that it does not change.
ADDED_LATER = {
    "data": ("skip_bad_files", "document_mask", "mixture", "test", "begin_tokens", "end_tokens"),
    "distillation": ("hidden", "vectors", "similarities"),
    "optimizer": ("name", "moments", "base_width", "ema_decay", "rates"),
    "evaluation": ("samples", "sample_tokens"),
    "training": ("scan_layers", "spike_factor", "spike_window", "max_returns"),
}
# Settings that were added before ADDED_LATER was: earlier results with their defaults have the hash without them.
ADDED_BEFORE = ("task", "distillation", "data.image_size", "data.limit")
TASK_NAMES = ("language", "images", "text_classification", "sentence_vectors")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One run. `model` holds fields of ModelConfig; vocab_size and max_length default to what the data needs.

    For task images, `model` holds `architecture` and the fields of that architecture's config.

    Raises:
      ValueError: an unknown field or section (the message suggests close matches), or a wrong type or value.
    """

    seed: int = 0
    task: str = "language"  # one of TASK_NAMES
    # Folder of a run or of a packed model to start from: shape, tokenizer and weights (training/initial.py)
    init: str | None = None
    model: Mapping[str, Any]
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    training: TrainingConfig = dataclasses.field(default_factory=TrainingConfig)
    evaluation: EvaluationConfig = dataclasses.field(default_factory=EvaluationConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    distributed: DistributedConfig = dataclasses.field(default_factory=DistributedConfig)
    distillation: DistillationConfig = dataclasses.field(default_factory=DistillationConfig)
    adapter: AdapterConfig = dataclasses.field(default_factory=AdapterConfig)

    def __post_init__(self) -> None:
        check_name("config.task", self.task, TASK_NAMES)
        used_by = {
            "limit": ("images", "text_classification", "sentence_vectors"),
            "image_size": ("images",),
            "skip_bad_files": ("language",),
            "document_mask": ("language",),
            "mixture": ("language",),
            "begin_tokens": ("sentence_vectors",),
            "end_tokens": ("sentence_vectors",),
        }
        for name, tasks in used_by.items():  # otherwise it would be silently ignored
            value = getattr(self.data, name)
            if self.task not in tasks and value not in (None, False):
                raise ValueError(
                    f"data.{name}: got {value} for task {self.task!r}, which has no such setting; remove it"
                )
        if self.data.document_mask and self.model.get("attention") == "linear":
            raise ValueError(
                "data.document_mask: got model.attention 'linear', whose state covers all earlier tokens, expected "
                "another; set data.document_mask=False"
            )
        if self.evaluation.samples and self.task != "language":
            raise ValueError(
                f"evaluation.samples: got {self.evaluation.samples} for task {self.task!r}, which writes no text; "
                "remove it"
            )
        distilled = ("text_classification", "sentence_vectors")
        if self.distillation.teacher is not None and self.task not in distilled:
            raise ValueError(
                f"distillation.teacher: got a teacher for task {self.task!r}, expected task {' or '.join(distilled)}"
            )
        if self.task == "sentence_vectors" and (self.distillation.teacher or self.init) is None:
            raise ValueError(
                "init: got None for task 'sentence_vectors', expected the folder of an encoder, whose vectors are "
                "learned unless distillation.teacher names another"
            )
        if self.init is not None and (self.task == "images" or self.training.scan_layers):
            raise ValueError(
                f"init: got {self.init} for task {self.task!r} with training.scan_layers={self.training.scan_layers}, "
                "expected a text model without scan_layers; remove one of them"
            )
        if self.adapter.rank is not None and (
            self.task != "language"
            or self.init is None
            or self.mesh.batch_parts * self.mesh.context * self.mesh.tensor > 1
        ):
            raise ValueError(
                f"adapter.rank: got {self.adapter.rank} for task {self.task!r} with init {self.init}, expected task "
                "'language', the folder of a packed model, and a mesh of one device"
            )
        if self.training.scan_layers and self.optimizer.rates is not None:
            raise ValueError(
                "training.scan_layers: got True with optimizer.rates, which name single layers, expected False; remove "
                "one of them"
            )
        if self.training.scan_layers and (self.task == "images" or self.distillation.relations):
            reads = f"task {self.task!r}" if self.task == "images" else "distillation.relations"
            raise ValueError(
                f"training.scan_layers: got True with {reads}, expected a text model without relations between "
                "layers; remove it"
            )
        if self.data.batch_size % self.training.accumulate:
            raise ValueError(
                f"data.batch_size={self.data.batch_size} is not a multiple of "
                f"training.accumulate={self.training.accumulate}; change one of them"
            )
        if self.data.batch_size // self.training.accumulate % self.mesh.batch_parts:
            raise ValueError(
                f"mesh: got data={self.mesh.data} times fsdp={self.mesh.fsdp}, expected a divisor of the "
                f"{self.data.batch_size // self.training.accumulate} sequences of a micro-batch "
                f"(data.batch_size / training.accumulate); change one of them"
            )
        check_context(self.mesh.context, self.task, self.data.length, self.model, self.distillation.relations)
        if self.task == "images":  # validate the model's fields before any work
            self.image_model_config()
            if self.optimizer.base_width is not None:
                raise ValueError(
                    f"optimizer.base_width: got {self.optimizer.base_width} for task 'images', expected None"
                )
        elif self.init is None or "hidden_size" in self.model:  # else `init` gives the shape
            model = self.model_config(vocab_size=self.model.get("vocab_size", 256))
            if self.optimizer.base_width is not None:
                check_transferable(model.precisions(), model.norm_scale)

    @property
    def width_ratio(self) -> float:
        """hidden_size as a multiple of optimizer.base_width; 1 if that is None."""
        base = self.optimizer.base_width
        return 1.0 if base is None else self.model["hidden_size"] / base

    def model_config(self, vocab_size: int) -> ModelConfig:
        """The model for a tokenizer of `vocab_size`; max_length defaults to data.length.

        A language model's trained_length is data.length.

        Raises:
          ValueError: model.vocab_size or model.max_length is too small for the data, a field is invalid, or the
            model does not fit the task.
        """
        if self.model.get("architecture", "transformer") != "transformer":
            raise ValueError(
                f"model.architecture: got {self.model['architecture']!r} for task {self.task!r}, expected "
                "transformer; set task to images"
            )
        fields = {"vocab_size": vocab_size, "max_length": self.data.length} | dict(self.model)
        fields.pop("architecture", None)
        if "trained_length" in self.model and self.task != "sentence_vectors":
            raise ValueError(
                f"model.trained_length: got {self.model['trained_length']!r}, expected it to be unset: a run always "
                f"uses data.length ({self.data.length}); remove it"
            )
        if self.task == "language":
            fields["trained_length"] = self.data.length
        config = ModelConfig.from_dict(fields)
        pooling = "mean" if self.task == "sentence_vectors" else "none"
        if config.pooling != pooling:
            raise ValueError(
                f"model.pooling: got {config.pooling!r} for task {self.task!r}, expected {pooling!r}"
            )
        if (config.num_classes > 0) != (self.task == "text_classification"):
            raise ValueError(
                f"model.num_classes: got {config.num_classes} for task {self.task!r}; expected 0 for language and "
                "the number of classes for text_classification"
            )
        for name, least in (("vocab_size", vocab_size), ("max_length", self.data.length)):
            if getattr(config, name) < least:
                raise ValueError(
                    f"model.{name}: got {getattr(config, name)}, expected at least {least} for this data"
                )
        return config

    def image_model_config(self) -> Architecture:
        """The model for images. Raises ValueError: a field is invalid, or the model does not take images."""
        if self.model.get("architecture", "transformer") == "transformer":
            raise ValueError(
                "model.architecture: got transformer for task 'images', expected mlp, cnn or vision_transformer"
            )
        return model_config(self.model)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any] | ConfigDict) -> RunConfig:
        """From nested dicts or an `ml_collections.ConfigDict`; the inverse of `to_dict`."""
        fields = fields.to_dict() if isinstance(fields, ConfigDict) else dict(fields)
        sections: dict[str, type] = {
            "data": DataConfig,
            "optimizer": OptimizerConfig,
            "training": TrainingConfig,
            "evaluation": EvaluationConfig,
            "mesh": MeshConfig,
            "distributed": DistributedConfig,
            "distillation": DistillationConfig,
            "adapter": AdapterConfig,
        }
        known = [field.name for field in dataclasses.fields(cls)]
        for name, value in fields.items():
            check_name("section of config", name, known)
            if name not in ("seed", "task", "init") and not isinstance(value, Mapping):
                raise ValueError(f"config.{name}: got {value!r}, expected a section of fields")
        if "model" not in fields:
            raise ValueError(f"config has no section model; got {', '.join(fields) or 'nothing'}")
        seed = fields.get("seed", 0)
        if not is_a(seed, int) or not 0 <= seed < 2**32:
            raise ValueError(f"config.seed: got {seed!r}, expected an integer from 0 to 2**32 - 1")
        built = {
            name: section_of(name, kind, fields[name]) for name, kind in sections.items() if name in fields
        }
        task, init = fields.get("task", "language"), fields.get("init")
        if init is not None and not isinstance(init, str):
            raise ValueError(f"config.init: got {init!r}, expected the folder of a model or None")
        return cls(seed=seed, task=task, init=init, model=plain(fields["model"]), **built)

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dicts, lists and scalars that survive a JSON round trip."""
        return plain(dataclasses.asdict(self))

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str) -> RunConfig:
        """Raises: ValueError: not JSON, or not the JSON of a run config."""
        try:
            fields = json.loads(text)
        except RecursionError as error:
            raise ValueError("run config: got JSON that is nested too deeply") from error
        if not isinstance(fields, dict):
            raise ValueError(f"run config: got JSON {type(fields).__name__}, expected an object of sections")
        return cls.from_dict(fields)

    def hash(self) -> str:
        """12 hex digits that identify these settings except WHERE_COMPUTED; stable across processes."""
        return self.hashes()[0]

    def hashes(self) -> tuple[str, ...]:
        """The hash, and the one of earlier results with these settings, see ADDED_BEFORE."""
        fields = _hashed_fields(
            RunConfig.from_dict(self.to_dict())
        )  # 1 and 1.0 in a float field are the same
        later = {"data": plain(DataConfig()), "distillation": plain(DistillationConfig())}
        defaults: dict[str, Any] = {"task": "language", **_without_added(later)}
        earlier = {name: dict(value) if isinstance(value, dict) else value for name, value in fields.items()}
        for path in ADDED_BEFORE:
            *sections, name = path.split(".")
            of, default = earlier, defaults
            for section in sections:
                of, default = of[section], default[section]
            if of.pop(name) != default[name]:
                return (_hash(fields),)
        return _hash(fields), _hash(earlier)


def _hash(fields: Mapping[str, Any]) -> str:
    settings = json.dumps(fields, indent=2, sort_keys=True) + "\n"
    return hashlib.sha256(settings.encode()).hexdigest()[:12]


def data_config(fields: Mapping[str, Any]) -> DataConfig:
    """Section `data` alone. Raises ValueError: an unknown field or a wrong type."""
    return section_of("data", DataConfig, fields)


def differing_fields(a: RunConfig, b: RunConfig, ignored: Collection[str] = ()) -> list[str]:
    """`section.field: value in a, value in b` for every setting that differs, except WHERE_COMPUTED and `ignored`."""
    flat_a, flat_b = flatten(_hashed_fields(a)), flatten(_hashed_fields(b))
    names = sorted((flat_a.keys() | flat_b.keys()) - set(ignored))
    return [
        f"{name}: {flat_a.get(name, 'not set')!r}, {flat_b.get(name, 'not set')!r}"
        for name in names
        if (name in flat_a) != (name in flat_b) or flat_a[name] != flat_b[name]
    ]


def flat_fields(config: RunConfig) -> dict[str, Any]:
    """`section.field` -> value, for every setting."""
    return flatten(config.to_dict())


def _hashed_fields(config: RunConfig) -> dict[str, Any]:
    fields = config.to_dict()
    for section in WHERE_COMPUTED:
        del fields[section]
    if config.init is None:
        del fields["init"]
    if config.adapter.rank is None:
        del fields["adapter"]
    return _without_added(fields)


def _without_added(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of sections without those of ADDED_LATER that have their default."""
    kinds = {field.name: field.default_factory for field in dataclasses.fields(RunConfig)}
    for section in ADDED_LATER.keys() & fields.keys():
        default = kinds[section]()  # type: ignore[operator]
        for name in ADDED_LATER[section]:
            if fields[section][name] == getattr(default, name):
                del fields[section][name]
    return fields
